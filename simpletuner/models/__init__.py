"""What is trained: families of denoisers, and what two families share."""
