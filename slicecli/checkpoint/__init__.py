"""Models on disk: where they come from, what their files hold, how they are loaded, and how a slice is written."""
