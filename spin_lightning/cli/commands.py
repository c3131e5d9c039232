"""The commands other than `fit` and `validate`.

Each parses its arguments first and imports what it needs afterwards: a help page needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from spin_lightning.cli.doctor import doctor
from spin_lightning.cli.export import export
from spin_lightning.cli.first_runs import demo, quickstart
from spin_lightning.cli.parsing import command_parser, run_first
from spin_lightning.cli.recipes import recipes
from spin_lightning.cli.serve import serve
from spin_lightning.cli.study import study
from spin_lightning.cli.watch import watch
from spin_lightning.errors import SettingError, SpinError
from spin_lightning.run.folder import RunFolder

if TYPE_CHECKING:
    from spin_lightning.evaluation.base import Benchmark


def evaluate(args: list[str]) -> None:
    """Score iterates of a run on lm-evaluation-harness tasks and on MT-Bench.

    Results are cached in the run folder: a second call measures only what is missing.
    """
    from spin_lightning.evaluation.settings import Answering, HarnessSettings, JudgeSettings

    parser = command_parser("evaluate", evaluate)
    parser.add_argument("run", help="The run folder.")
    parser.add_argument(
        "--iterates",
        nargs="+",
        default=["all"],
        help="Numbers of iterates, best, last, all, or mixture (the mixture of all iterates).",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        help="Tasks, groups or presets of the harness, or folders of YAML tasks.",
    )
    parser.add_class_arguments(HarnessSettings, skip={"tasks"})
    parser.add_argument(
        "--mt_bench", "--mt-bench", help="Folder or hub id of MT-Bench's files; default: skip it."
    )
    parser.add_class_arguments(JudgeSettings, "judge")
    parser.add_class_arguments(Answering, "answers")
    parser.add_argument(
        "--versus",
        help="With --mt_bench: compare every iterate's answers with this iterate's; "
        "default: grade each answer by itself.",
    )
    given = parser.parse_args(run_first(args))

    from spin_lightning.callbacks.console import console, quiet_libraries, show_table
    from spin_lightning.evaluation.base import evaluate_run
    from spin_lightning.evaluation.contestants import contestants
    from spin_lightning.evaluation.lm_eval import Harness
    from spin_lightning.evaluation.mt_bench.benchmark import MTBench, judge_lines
    from spin_lightning.evaluation.results import read_results, score_table

    quiet_libraries()
    run = RunFolder(Path(given.run))
    benchmarks: list[Benchmark] = []
    if given.tasks:
        names = [field.name for field in fields(HarnessSettings) if field.name != "tasks"]
        chosen = {name: given[name] for name in names}
        benchmarks.append(Harness(HarnessSettings(tuple(given.tasks), **chosen)))
    if given.mt_bench:
        (versus,) = contestants(run, [given.versus]) if given.versus else (None,)
        judge, answering = JudgeSettings(**given.judge), Answering(**given.answers)
        benchmarks.append(MTBench(given.mt_bench, judge, answering, versus))
    if not benchmarks:
        raise SpinError("nothing to evaluate", fix="give --tasks or --mt_bench")
    for contestant, results in evaluate_run(run, [str(n) for n in given.iterates], benchmarks):
        where = run.evaluation(contestant.name)
        console.print(f"{contestant.label}: {len(results)} results in {where}")
        for line in (line for result in results for line in judge_lines(result)):
            console.print(f"  {line}")
    show_table(score_table(read_results(run)))


def data(args: list[str]) -> None:
    """Show how data are read for a model: counts, what is left out, lengths, examples as ids."""
    parser = command_parser("data", data)
    parser.add_argument(
        "--config",
        help="A config of `fit`, whose settings the other options replace; default: none.",
    )
    parser.add_argument(
        "--data",
        help="A file, folder, pattern or hub id, testbed, or gsm8k_small; default: the config's.",
    )
    parser.add_argument(
        "--model",
        help="Folder, hub id or GGUF file of the model to read for, or smollm2; default: the "
        "config's.",
    )
    parser.add_argument(
        "--columns",
        type=dict[str, str] | None,
        help="Our names of columns to the source's; default: the config's, or recognized.",
    )
    parser.add_argument(
        "--chat_template", help="File with a chat template; default: the tokenizer's."
    )
    parser.add_argument(
        "--chat_template_kwargs",
        type=dict[str, Any] | None,
        help="Variables of the template; default: the config's.",
    )
    parser.add_argument(
        "--thoughts",
        type=Literal["refuse", "keep", "drop"] | None,
        help="What to do with rows that have thoughts; default: refuse them.",
    )
    parser.add_argument(
        "--turns",
        type=Literal["last", "all"] | None,
        help="Which assistant turns are answers; default: last.",
    )
    parser.add_argument(
        "--max_prompt_tokens", type=int | None, help="Cap of prompts; default: the config's."
    )
    parser.add_argument(
        "--max_response_tokens", type=int | None, help="Cap of responses; default: the config's."
    )
    parser.add_argument("--examples", type=int, default=3, help="How many examples to show.")
    parser.add_argument(
        "--tokens", nargs="?", type=bool, const=True, default=False, help="Show token by token."
    )
    given = parser.parse_args(args)
    if given.config is None and None in (given.data, given.model):
        raise SpinError("nothing to read", fix="give --data and --model, or --config")

    from spin_lightning.callbacks.console import console, quiet_libraries
    from spin_lightning.cli.data_page import DataPage
    from spin_lightning.cli.reading import data_and_model
    from spin_lightning.data.data_record import chosen

    quiet_libraries()
    settings = {
        name: value
        for name, value in given.items()
        if value is not None and name not in ("config", "model", "examples", "tokens")
    }
    source, module = data_and_model(given.config, settings, given.model)
    text_format = source.make_format(module)
    reader = source.make_reader(module, text_format)
    for name, limit in (("data", source.max_examples), ("val_data", source.val_examples)):
        place = getattr(source, name)
        if place is not None:
            examples, overview = reader.survey(place, name, limit)
            page = DataPage(
                overview, text_format, chosen(examples, given.examples), tokens=given.tokens
            )
            page.show(console)


def chat(args: list[str]) -> None:
    """Talk to an iterate of a run, or to several at once, in the terminal.

    The chat uses the run's own tokenizer, chat template and stop ids. /reset starts over, /quit or
    Ctrl-D ends it, Ctrl-C stops at once.
    """
    parser = command_parser("chat", chat)
    parser.add_argument("run", help="The run folder.")
    parser.add_argument(
        "--iterates",
        nargs="+",
        default=["last"],
        help="Numbers of iterates, best, last, all, or mixture (of all iterates: each chat with it "
        "is with one iterate, which is drawn). Several answer side by side.",
    )
    parser.add_argument(
        "--prompt",
        nargs="+",
        help="Answer these prompts, each in a chat of its own, and exit; default: a chat in the "
        "terminal.",
    )
    parser.add_argument(
        "--max_tokens", type=int | None, help="Cap of an answer; default: the run's cap."
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="1 samples from the iterate itself, as the run does; 0 takes the likeliest tokens.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the sampled tokens.")
    parser.add_argument("--system", help="A system turn before the chat; default: the template's.")
    given = parser.parse_args(args)

    from spin_lightning.callbacks.console import quiet_libraries
    from spin_lightning.cli.chat import Chat, answer_prompts
    from spin_lightning.cli.chat_answers import Answers, ChatSettings

    settings = ChatSettings(
        given.max_tokens, float(given.temperature), int(given.seed), given.system
    )
    quiet_libraries()
    answers = Answers(RunFolder(Path(given.run)), [str(n) for n in given.iterates], settings)
    if given.prompt is not None:
        answer_prompts(answers, given.prompt)
    else:
        Chat(answers).run()


def report(args: list[str]) -> None:
    """Compare runs: a table of every metric over the iterates, a figure and an HTML page."""
    parser = command_parser("report", report)
    parser.add_argument("runs", nargs="+", help="The run folders.")
    parser.add_argument("--out", help="Folder of the page; default: report/ in the first run.")
    given = parser.parse_args(args)

    from spin_lightning.callbacks.console import console, show_table
    from spin_lightning.report.report import comparison_table, draw_iterates, write_report
    from spin_lightning.report.run_view import read_runs

    runs = [RunFolder(Path(folder)) for folder in given.runs]
    views = read_runs(runs)
    show_table(comparison_table(views))
    folder = Path(given.out) if given.out else runs[0].report
    name = "iterates.png" if len(runs) == 1 else "comparison.png"
    histories = {view.name: view.records for view in views}
    console.print(f"Picture: {draw_iterates(histories, folder / name)}")
    console.print(f"Report: {write_report(views, folder)}")


def testbed(args: list[str]) -> None:
    """Build the embedded testbed, or a small model of your own data, and print the paths."""
    parser = command_parser("testbed", testbed)
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed of the testbed's language and base model."
    )
    parser.add_argument(
        "--data",
        help="A data file: train a tokenizer and a small Llama on it; default: build the testbed.",
    )
    parser.add_argument("--out", help="With --data: the model folder to write.")
    parser.add_argument(
        "--minutes", type=float, default=3.0, help="With --data: how many minutes to train."
    )
    given = parser.parse_args(args)
    if given.data is not None and given.out is None:
        raise SettingError("out", None, "--data needs a model folder to write", fix="give --out")

    from spin_lightning.callbacks.console import console
    from spin_lightning.testbed import ensure, train_base

    if given.data is None:
        paths = ensure(given.seed)
        console.print(f"model: {paths.model}\ndata:  {paths.data}")
    else:
        console.print(f"model: {train_base(given.data, Path(given.out), minutes=given.minutes)}")


COMMANDS: Final[dict[str, Callable[[list[str]], None]]] = {
    "quickstart": quickstart,
    "demo": demo,
    "recipes": recipes,
    "data": data,
    "doctor": doctor,
    "export": export,
    "evaluate": evaluate,
    "chat": chat,
    "report": report,
    "serve": serve,
    "watch": watch,
    "study": study,
    "testbed": testbed,
}
