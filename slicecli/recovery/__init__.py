"""Training a slice to predict as its dense model does: the loss, the rows, the trainer."""
