"""What other trainers were told, as a config of ours."""
