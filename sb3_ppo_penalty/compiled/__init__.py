"""The optimizer's step and the acting policy as compiled graphs."""
