"""The one training loop that every training stage shares."""
