"""
The side-by-side comparison behind ``python -m sb3_ppo_penalty compare``.

``algorithms`` names what can be compared, ``grid`` lists the runs and what identifies each, ``run`` performs one,
``execution`` performs many, through ``joblib_backend`` on this machine or ``ray_backend`` on a cluster, ``results`` reads them
back, ``statistics``, ``report`` and ``plots`` summarise them, ``references`` has known returns, and ``cli`` is the command
line.
"""
