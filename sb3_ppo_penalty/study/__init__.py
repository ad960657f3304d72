"""
The side-by-side comparison behind ``python -m sb3_ppo_penalty compare``.

``algorithms`` names what can be compared, ``grid`` works out the runs and what identifies each, ``run`` performs one,
``execution`` performs many, in ``processes`` of this machine or on a ``cluster``, ``results`` reads them back, ``statistics``,
``report`` and ``plots`` say what they mean, and ``cli`` is the command line.
"""
