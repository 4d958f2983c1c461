"""Write text with a trained model: the prompt and what follows, up to the end of the text.

python -m tinylm.generate --workdir=runs/tales --prompt="Once upon a time" --temperature=0.8
python -m tinylm.generate --workdir=runs/tales --prompt_file=beginning.txt --num_samples=3

A single text appears while it is written; several are numbered.
"""

import functools
import json
import pathlib
import sys
from collections.abc import Sequence

from absl import flags as absl_flags
from absl.flags import FlagValues

from tinylm import cli
from tinylm.core.errors import UserError
from tinylm.core.storage import check_on_disk
from tinylm.inference.samplers import Sampler


def generate(flags: FlagValues) -> None:
    """Write as the flags say; only text goes to stdout."""
    from tinylm.core.distributed import is_main
    from tinylm.inference.decode import check_prompts
    from tinylm.inference.text import numbered, write_texts
    from tinylm.run.open_run import open_run

    sampler = Sampler(
        flags.temperature, flags.top_k, flags.top_p, flags.min_p, flags.repetition_penalty
    )
    sampler.check(prefix="--")
    if "" in (flags.stop or []):
        raise UserError(
            "--stop must not be empty: every text would end before its first character."
        )
    given = [*(flags.prompt or []), *map(read_prompt, flags.prompt_file or [])]
    run = open_run(flags.workdir, flags.step)
    if run.config.get("data", {}).get("lowercase"):
        # The model knows texts in lower case alone.
        given = [text.lower() for text in given]
    prompts = [text for text in given or [""] for _ in range(flags.num_samples)]
    show = None
    if len(prompts) == 1 and is_main() and not flags.json:
        check_prompts([[run.start_id, *run.tokenizer.encode(prompts[0])]], run.model_config.context)
        show = functools.partial(print, end="", flush=True)
        show(prompts[0])
    texts = write_texts(
        run,
        prompts,
        max_tokens=flags.max_tokens,
        sampler=sampler,
        seed=flags.seed,
        stop=flags.stop or [],
        logprobs=flags.json,
        show=show,
    )
    if not is_main():
        return
    whole = [text.prompt + text.completion for text in texts]
    if flags.json:
        ids = [text.ids for text in texts]
        logprobs = [text.logprobs for text in texts]
        print(json.dumps({"texts": whole, "step": run.step, "ids": ids, "logprobs": logprobs}))
    else:
        print("" if show else numbered(whole))


def read_prompt(path: str) -> str:
    """Return the text of a file without the line break at its end, which editors add."""
    check_on_disk("--prompt_file", path)
    try:
        text = pathlib.Path(path).expanduser().read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompt_file={path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt_file={path} is not UTF-8 (byte {error.start}); save it as UTF-8."
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


def define_flags(flags: FlagValues) -> None:
    """Add the flags of this command."""
    default = Sampler()
    absl_flags.DEFINE_multi_string(
        "prompt",
        None,
        "text to go on from (may be given several times; none: a new text)",
        flag_values=flags,
    )
    absl_flags.DEFINE_multi_string(
        "prompt_file",
        None,
        "a file with such a text (its last line break is left out)",
        flag_values=flags,
    )
    absl_flags.DEFINE_integer(
        "max_tokens", 200, "most tokens to write after a prompt", lower_bound=1, flag_values=flags
    )
    absl_flags.DEFINE_float(
        "temperature",
        0.8,
        "0: always the most probable token; 1: the model's own distribution",
        flag_values=flags,
    )
    absl_flags.DEFINE_integer(
        "top_k", default.top_k, "draw from the k most probable tokens (0: all)", flag_values=flags
    )
    absl_flags.DEFINE_float(
        "top_p",
        default.top_p,
        "draw from the fewest tokens that have this probability together",
        flag_values=flags,
    )
    absl_flags.DEFINE_float(
        "min_p",
        default.min_p,
        "draw from tokens at least this part as probable as the first",
        flag_values=flags,
    )
    absl_flags.DEFINE_float(
        "repetition_penalty",
        default.repetition_penalty,
        "above 1: tokens of the text count less",
        flag_values=flags,
    )
    absl_flags.DEFINE_multi_string(
        "stop",
        None,
        "end a text before this string (may be given several times)",
        flag_values=flags,
    )
    absl_flags.DEFINE_integer(
        "num_samples", 1, "texts for each prompt", lower_bound=1, flag_values=flags
    )
    absl_flags.DEFINE_integer(
        "seed", 0, "seed of the draws", lower_bound=0, upper_bound=2**31 - 1, flag_values=flags
    )
    cli.define_step(flags)
    cli.define_workdir(flags)
    cli.define_json(flags)


COMMAND = cli.Command(__doc__, generate, define_flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: this process's); return its exit code."""
    return cli.run(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main())
