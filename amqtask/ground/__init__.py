"""What every row above uses, and what uses nothing of ours itself."""
