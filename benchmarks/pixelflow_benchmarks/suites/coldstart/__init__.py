"""What a user waits for before the first image, each time in a process of its own."""
