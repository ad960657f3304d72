"""Cases of stable-baselines3's suite that cannot pass in another class's name: what their failure says, and the reason."""

_NAMED = {
    "test_run.py::test_ppo_warnings": ("PPO on the GPU", "its last check wants the name PPO in SB3's warning"),
    "test_tensorboard.py::test_tensorboard[ppo]": ("'PPO_1'", "it wants a folder PPO_1, and the class's name is its name"),
}
#: (the algorithm's name, the class's name) -> what is excused
EXCUSED = {
    ("PPO", "PPOPenalty"): {
        **_NAMED,
        "test_save_load.py::test_save_load_clip_range_portable[PPOPenalty]": (
            "isinstance(None, FloatSchedule)",
            "it wants a clip range by default, and the penalty goes without",
        ),
    },
    ("PPO", "PPOClip"): _NAMED,
}
