"""What an update maximises and measures: losses, divergences, the penalty and its controllers, as pure functions."""
