"""The passes over the blocks of a model: statistics, the refit, the published method. None of them knows file formats."""
