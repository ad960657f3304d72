"""One update of the policy: the optimizer's steps, the guard that holds them, and the checks afterwards."""
