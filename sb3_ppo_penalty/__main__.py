"""``python -m sb3_ppo_penalty``: train, watch, plot and share through RL Zoo, compare with stock PPO."""

import argparse
import sys
from collections.abc import Sequence

from sb3_ppo_penalty import zoo
from sb3_ppo_penalty.zoo import commands

COMMANDS = {
    "train": "RL Zoo's train: train an agent, continue one (-i) or search hyperparameters (-optimize)",
    "enjoy": "RL Zoo's enjoy: watch or evaluate a trained agent",
    "benchmark": "RL Zoo's benchmark: evaluate every agent of a log folder (--no-hub to stay offline)",
    "record_video": "RL Zoo's record_video: film a trained agent",
    "record_training": "RL Zoo's record_training: film an agent's checkpoints (needs ffmpeg)",
    "push_to_hub": "RL Zoo's push_to_hub: upload a trained agent, with a card, to the Hugging Face Hub",
    "load_from_hub": "RL Zoo's load_from_hub: download an agent (a pickle, which is code: see the documentation)",
    "plot_train": "RL Zoo's plot_train: show the returns of the training episodes",
    "all_plots": "RL Zoo's all_plots: show and tabulate the evaluations of several runs",
    "plot_from_file": "RL Zoo's plot_from_file: draw what all_plots has saved, with intervals if asked for (-r)",
    "compare": "compare the algorithms with stock PPO and TRPO over seeds: table, report and plots",
}


def build_parser() -> argparse.ArgumentParser:
    """
    Build the parser of the command's name; each command parses its own arguments.

    :return: the parser
    """
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="python -m sb3_ppo_penalty",
        usage="%(prog)s COMMAND ...",
        description="PPO with an adaptive KL penalty, and PPO-clip.",
        epilog="\n".join(["commands:", *(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below; COMMAND --help says more")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run one command of ``python -m sb3_ppo_penalty``.

    :param arguments: words of the command line, without the program; default: this process's
    :return: the exit code
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    command = parser.parse_args(words[:1]).command
    if command == "compare":
        # Imported here, like RL Zoo below, so that no command waits for imports that only another one needs
        from sb3_ppo_penalty.study.cli import main as compare

        return compare(words[1:])
    try:
        zoo.register()
    except zoo.MissingExtraError as error:
        parser.exit(1, f"{error}\n")
    commands.run(command, words[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
