"""What a model is, in numbers: sizes, legal dims, widths, and the plugins that declare families."""
