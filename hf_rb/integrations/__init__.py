"""What other packages' command lines find of ours."""
