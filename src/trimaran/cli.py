"""The command line: `trimaran VERB TARGET [ARGS] [dotted.key=value ...]`.

A verb is a row of `VERBS`: the "module:function" that carries it out, imported when called, so that `--help` imports
no torch. The function is `main(target, overrides, *args, **flags) -> int | None`:

    target      the first word, a str; None for a verb that has no target
    overrides   the words of the form dotted.key=value, unparsed and in order, for `trimaran.config.load`
    *args       the other words, at most as many as the row names in `args`
    **flags     one bool for each switch the row declares in `flags`, one str or None for each of its `options`, with _
                for - in their names

What it returns is the exit code (None: 0). A `Refusal` (and a full disk) is told on one line and exits 2, Ctrl-C exits
130, and any other exception is a bug and keeps its traceback.
"""

import errno
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import typer

from trimaran.errors import Refusal, nearest_first


@dataclass(frozen=True)
class Option:
    """A flag with a value: what stands for the value in the help, and the help."""

    value: str
    help: str


@dataclass(frozen=True)
class Verb:
    """One row of the command line. `flags` are switches with their help, `options` flags with a value; a value that is
    a setting of a recipe is always an override."""

    function: str
    summary: str  # fits one line of --help
    about: str  # what -h adds to it
    examples: tuple[str, str]
    target: str | None = None
    args: tuple[str, ...] = ()
    flags: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """What `trimaran train` does for one `stage` of a recipe: which settings to read and which function takes them."""

    settings: str
    main: str


VERBS: dict[str, Verb] = {
    "demo": Verb(
        "trimaran.demo.run:main",
        "Train a small hybrid on Python's own standard library, offline.",
        "Trains a tokenizer and a model with Mamba-2, attention, latent experts and a draft block, draws its loss, "
        "compares it with a bigram model, prints samples and leaves a run folder that chat and generate open.",
        examples=("trimaran demo", "trimaran demo --full run=runs/life"),
        flags={"full": "Go on: fine-tuning, reinforcement learning, distillation, healing; each scored (14 minutes)."},
    ),
    "train": Verb(
        "trimaran.cli:train",
        "Carry out a recipe; the same command again resumes it.",
        "RECIPE is a TOML file, or a run folder that holds one. Sizes under [parallel] start as many processes.",
        examples=(
            "trimaran train recipes/laptop/text.toml data.path=notes/",
            "trimaran train recipes/laptop/text.toml data.path=book.txt train.steps=200 run=runs/book",
        ),
        target="RECIPE",
    ),
    "show": Verb(
        "trimaran.model.show:main",
        "Draw a model's layers; count parameters, bytes and FLOPs.",
        "Nothing is allocated, so any preset can be shown on any machine.",
        examples=("trimaran show nano-3", "trimaran show runs/demo --json"),
        target="PRESET|SIZE|FOLDER",
        flags={"json": "Print one JSON document instead."},
    ),
    "plan": Verb(
        "trimaran.plan.main:main",
        "Find the fastest way to spread a model over devices.",
        "Counts time and memory of every legal layout, shows the best, why the others fell out, and where time and "
        "memory go. Nothing is allocated. For a recipe, sequence, batch and precision are its own.",
        examples=(
            "trimaran plan nano-3 --gpus 64 --hardware h100 --seq 8192 --tokens-per-step 25M",
            'trimaran plan nano-3 --gpus 8 --given "fsdp=8,ep=8,micro_batch=4" --global-batch 512 --seq 4096',
        ),
        target="PRESET|SIZE|FOLDER|RECIPE",
        flags={"json": "Print one JSON document instead."},
        options={
            "gpus": Option("N", "How many devices (8)."),
            "hardware": Option("NAME", "a100, h100 (default), h200, b200, gb200, cpu, or a file of --measure."),
            "seq": Option("N", "Tokens of a row (8192)."),
            "global-batch": Option("N", "Rows of a step."),
            "tokens-per-step": Option("N", "Tokens of a step instead (25M, published for Nemotron 3)."),
            "precision": Option("NAME", "fp32, bf16 (default), fp8, nvfp4."),
            "given": Option("SIZES", "Predict this layout alone, such as tp=2,fsdp=4,micro_batch=1."),
            "measure": Option("FILE", "Measure this machine first, write FILE (JSON), and plan for it."),
            "write": Option("FILE", "Write the best layout as sections of a recipe (TOML)."),
            "picture": Option("FILE", "Draw time and memory of the best layouts (PNG)."),
        },
    ),
    "chat": Verb(
        "trimaran.engine.chat:main",
        "Talk with a model in the terminal.",
        "A base model says that it is one and completes plain text.",
        examples=("trimaran chat runs/demo", "trimaran chat runs/demo temperature=0.7 max_tokens=200"),
        target="FOLDER",
    ),
    "generate": Verb(
        "trimaran.engine.generate:main",
        "Continue a prompt.",
        "Without PROMPT, piped stdin is the prompt. Words after -- are the prompt, whatever they look like.",
        examples=(
            'trimaran generate runs/demo "def main("',
            'trimaran generate runs/demo "import os" temperature=0.8 samples=3 seed=1',
        ),
        target="FOLDER",
        args=("PROMPT",),
    ),
    "serve": Verb(
        "trimaran.serve.main:main",
        "Serve a model to OpenAI clients, and a chat page.",
        "Listens on this machine alone unless serve.host says otherwise. Ctrl-C or SIGTERM finishes what is running.",
        examples=(
            "trimaran serve runs/demo serve.port=8000",
            "trimaran serve runs/demo engine.drafter=mtp engine.rows=16 serve.api_key=secret serve.host=0.0.0.0",
        ),
        target="FOLDER",
    ),
    "score": Verb(
        "trimaran.evals.run:main",
        "Score a model on tasks, every episode on record.",
        "TASKS are names of tasks and suites separated by commas, an analysis (representation), or a TOML file with a "
        "[tasks.NAME] table each. The same command again goes on where it was. With --compare, two folders that were "
        "scored stand side by side.",
        examples=(
            "trimaran score runs/sft arithmetic,transforms n=500 samples=8 tasks.arithmetic.settings.digits=3",
            "trimaran score --compare runs/sft runs/rlvr",
        ),
        target="FOLDER",
        args=("TASKS",),
        flags={"json": "Print one JSON document instead.", "compare": "Compare two folders' scores, with intervals."},
        options={
            "lengths": Option("N,...", "Lengths of a suite's problems in tokens, such as 4k,8k,1M."),
            "endpoint": Option("URL", "Ask a server of OpenAI's protocol; FOLDER takes the records."),
        },
    ),
    "convert": Verb(
        "trimaran.cli:convert",
        "Make another checkpoint of one or several.",
        "A file of llama.cpp's format, FILE.gguf, is imported as the hub folder OUT, tokenizer and chat template with "
        "it; for a RUN one switch says how. --export saves a checkpoint, or a run's newest, as the hub folder OUT. "
        "--merge averages the checkpoints that a run kept (or last=N, or steps=[...]) into OUT, as a decay of the "
        "learning rate would have (profile=minus_sqrt).",
        examples=(
            "trimaran convert --merge runs/text runs/merged profile=cosine last=5",
            "trimaran convert smollm2.gguf smollm2 dtype=bfloat16",
        ),
        target="RUN|FILE.gguf",
        args=("OUT",),
        flags={
            "export": "Save a checkpoint, of however many processes, as a hub folder.",
            "merge": "Average checkpoints of a constant learning rate into a decayed model.",
        },
    ),
}

# a switch of `convert`, or how a file's name ends -> main(target, overrides, out)
CONVERSIONS = {"export": "trimaran.train.export:main", "merge": "trimaran.train.merge:main"}
IMPORTS = {".gguf": "trimaran.train.gguf:main"}

STAGES: dict[str, Stage] = {
    "pretrain": Stage("trimaran.train.recipe:PretrainRecipe", "trimaran.train.pretrain:main"),
    "extend": Stage("trimaran.train.extend_recipe:ExtendRecipe", "trimaran.train.extend:main"),
    "sft": Stage("trimaran.train.sft_recipe:SftRecipe", "trimaran.train.sft:main"),
    "rl": Stage("trimaran.rl.recipe:RLRecipe", "trimaran.rl.main:main"),
    "mopd": Stage("trimaran.rl.mopd_recipe:MopdRecipe", "trimaran.rl.mopd:main"),
    "heal": Stage("trimaran.rl.heal_recipe:HealRecipe", "trimaran.rl.heal:main"),
    "dpo": Stage("trimaran.rl.preference_recipe:PreferenceRecipe", "trimaran.rl.preference_main:main"),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 refused, 130 interrupted; a bug keeps its traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    # What follows "--" is text, whatever it looks like; typer would drop the mark without telling.
    border = words.index("--") if "--" in words else len(words)
    words, literal = words[:border], words[border + 1 :]
    verb = next((word for word in words if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        known = nearest_first(verb, VERBS)
        refuse(Refusal(f"unknown verb {verb!r}", ", ".join(known), f"did you mean: trimaran {known[0]}?"))
    app()(args=words, obj=literal, prog_name="trimaran")
    sys.exit(0)


def refuse(problem: Refusal) -> NoReturn:
    """Prints a refusal on one line of stderr and exits with code 2."""
    print("trimaran: " + " ".join(str(problem).split()), file=sys.stderr)
    sys.exit(2)


def app() -> typer.Typer:
    """The verbs as a typer application."""
    plain = {"help_option_names": ["-h", "--help"]}
    root = typer.Typer(
        rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False, context_settings=plain
    )
    root.callback(
        options_metavar="[-h] [--version]",
        subcommand_metavar="VERB TARGET [ARGS] [dotted.key=value]...",
        invoke_without_command=True,
        epilog="Settings are written in recipes and changed on the command line as dotted.key=value.\n\n"
        "trimaran VERB -h shows a verb with examples.",
    )(welcome)
    for name, verb in VERBS.items():
        root.command(
            name,
            help=f"{verb.summary}\n\n{verb.about}",
            short_help=verb.summary,
            epilog="\b\nExamples:\n  " + "\n  ".join(verb.examples),
            options_metavar=" ".join(["[-h]", *(f"[--{flag}]" for flag in (*verb.options, *verb.flags))]),
        )(command(name, verb))
    return root


def welcome(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version and exit.")
) -> None:
    """Hybrid language models (Mamba-2, attention, experts) through their whole life."""
    if version:
        from importlib import metadata

        print(f"trimaran {metadata.version('trimaran')}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        print(context.get_help())


def command(name: str, verb: Verb) -> Callable[..., None]:
    """The function typer calls for a verb, with the signature that its row describes."""

    def run(context: typer.Context, **given: Any) -> None:
        words = [given.pop("target", None), *(given.pop(arg.lower(), None) for arg in verb.args), *given.pop("words")]
        try:
            code = call(name, verb, [word for word in words if word is not None], context.obj, given)
        except Refusal as problem:
            refuse(problem)
        except KeyboardInterrupt:
            print("\ntrimaran: interrupted", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:
            # The reader of our output has left, as in `trimaran generate … | head`. Python would complain once more
            # when it flushes stdout at exit, so that is pointed elsewhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except OSError as problem:
            if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            place = problem.filename or "the output"
            refuse(Refusal(f"the disk is full at {place}", "a disk with free space", "free some space"))
        sys.exit(code)

    def parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)

    parameters = [parameter("context", typer.Context, inspect.Parameter.empty)]
    if verb.target:
        parameters.append(parameter("target", str, typer.Argument(..., metavar=verb.target, hidden=True)))
    for arg in verb.args:
        parameters.append(parameter(arg.lower(), str, typer.Argument(None, metavar=arg, hidden=True)))
    parameters.append(parameter("words", list[str], typer.Argument((), metavar="dotted.key=value", hidden=True)))
    for flag, option in verb.options.items():
        typed = typer.Option(None, f"--{flag}", metavar=option.value, help=option.help, show_default=False)
        parameters.append(parameter(flag.replace("-", "_"), str, typed))
    for flag, text in verb.flags.items():
        parameters.append(parameter(flag, bool, typer.Option(False, f"--{flag}", help=text)))
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def call(name: str, verb: Verb, words: list[str], literal: list[str], flags: Mapping[str, Any]) -> int:
    """Sorts the words into target, overrides and the rest, and calls the verb's function."""
    from trimaran.config import OVERRIDE, imported

    overrides = [word for word in words if OVERRIDE.match(word)]
    rest = [word for word in words if not OVERRIDE.match(word)] + literal
    target = None
    if verb.target:
        if not rest:
            raise Refusal(f"{name} without a target", f"trimaran {name} {verb.target}", f"see trimaran {name} -h")
        target = rest.pop(0)
    if len(rest) > len(verb.args):
        allowed = " ".join(["dotted.key=value", *(f"or one {arg}" for arg in verb.args)])
        raise Refusal(f"{rest[len(verb.args)]!r} after trimaran {name}", allowed, f"see trimaran {name} -h")
    return imported(verb.function)(target, overrides, *rest, **flags) or 0


def train(target: str, overrides: list[str]) -> int | None:
    """Reads the recipe (a TOML file, or a run folder that holds one), checks it whole, then hands it to its stage."""
    from trimaran import config

    path = Path(target)
    if path.is_dir():
        # The recipe in a run folder names the folder as it was; this one may have been moved.
        overrides = [f"run={path.absolute()}", *overrides]
        path = path / "recipe.toml"
    tables = config.override(config.read(path), overrides)
    if "stage" not in tables:
        raise Refusal(f"{path} has no stage", ", ".join(STAGES), f'add stage = "{next(iter(STAGES))}" at its top')
    stage: Stage = config.named(str(tables["stage"]), STAGES, "stage")
    recipe = config.load(config.imported(stage.settings), path, overrides)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = getattr(recipe, "parallel", None)
    if parallel is None and processes > 1:
        found = f"{processes} processes for stage {tables['stage']!r}"
        raise Refusal(found, "one process: it has no table [parallel]", "start it without torchrun")
    if parallel is None or parallel.world == processes == 1:
        return config.imported(stage.main)(recipe)
    words = ["train", target, *overrides]
    return config.imported("trimaran.parallel.launch:carry_out")(
        parallel, words, lambda: config.imported(stage.main)(recipe)
    )


def convert(target: str, overrides: list[str], out: str | None = None, **asked: bool) -> int | None:
    """Hands the file, or the checkpoints, to the one conversion that was asked for."""
    from trimaran import config

    chosen = [name for name, on in asked.items() if on]
    if not chosen and Path(target).suffix in IMPORTS:
        return config.imported(IMPORTS[Path(target).suffix])(target, overrides, out)
    if len(chosen) != 1:
        found = f"trimaran convert with {' and '.join(f'--{name}' for name in chosen) or 'no switch'}"
        allowed = "one of " + ", ".join(f"--{name}" for name in CONVERSIONS) + f", or a file: {', '.join(IMPORTS)}"
        raise Refusal(found, allowed, "see trimaran convert -h")
    return config.imported(CONVERSIONS[chosen[0]])(target, overrides, out)
