"""What a model and its slices will cost, and how good they will be, told before anything is computed."""
