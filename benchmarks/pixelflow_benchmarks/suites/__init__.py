"""What is measured: a module or folder for each question."""
