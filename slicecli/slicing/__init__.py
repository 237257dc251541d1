"""The passes over the blocks of a model: statistics, the refit, the published method. They know no file formats."""
