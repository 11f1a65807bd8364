"""What people look at: episodes, videos and learning curves."""
