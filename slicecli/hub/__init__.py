"""What touches the Hugging Face Hub beyond a plain download: error texts, and the model card."""
