"""Publishing: what a slice says of itself, its card, checks against its record, and the Hub."""
