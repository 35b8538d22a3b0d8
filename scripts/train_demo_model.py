"""Trains the embedded demo model from drawn clips; every command goes on where the last one stopped.

    python scripts/train_demo_model.py --work-dir runs/demo --stage all --time-limit-s 540

See docs/demo_model.md.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch

from demo_model.dit_training import train_dit
from demo_model.evaluation import cases, contact_sheet, evaluate, summary, write_png, write_report
from demo_model.export import adopt_checkpoint, averaged_networks, export, pack_run, unpack_run
from demo_model.networks import full_sizes, trial_sizes
from demo_model.optimisation import Ranks
from demo_model.sampling import PlainSampler
from demo_model.session import Session
from demo_model.text_training import is_trained, train_text
from demo_model.vae_training import is_frozen, load_frozen, train_vae

_START = time.monotonic()
# Training is pointless, and evaluation cut off, with less left of a command's time than this.
_LEAST_TRAINING_S, _LEAST_EVALUATION_S = 30.0, 40.0


def main() -> None:
    """Run the stages that the arguments ask for, as far as the time allows."""
    arguments = _parse()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.smoke:
        torch.set_num_threads(1)
        arguments.text_budget_s = arguments.vae_budget_s = arguments.dit_budget_s = 10.0
        arguments.batch_size = 2
    torch.set_float32_matmul_precision("high")
    ranks = Ranks.join()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    session = Session(
        work_dir=arguments.work_dir,
        sizes=trial_sizes() if arguments.smoke else full_sizes(),
        ranks=ranks,
        trial=arguments.smoke,
        compiled=not arguments.no_compile and ranks.device.type == "cuda",
        seed=arguments.seed,
        deadline=_START + arguments.time_limit_s,
    )
    if session.leads and arguments.unpack_resume is not None:
        unpack_run(session, arguments.unpack_resume)
    if session.leads and arguments.from_checkpoint is not None:
        adopt_checkpoint(session, arguments.from_checkpoint)
    ranks.wait()
    _run(session, arguments)
    if session.leads and arguments.pack_resume is not None:
        pack_run(session, arguments.pack_resume)
    ranks.leave()


def _run(session: Session, arguments: argparse.Namespace) -> None:
    stage, final = arguments.stage, True
    if stage in ("text", "all") and not is_trained(session):
        final = train_text(session, arguments.text_budget_s)
    if stage in ("vae", "all") and final and not is_frozen(session):
        final = train_vae(session, arguments.vae_budget_s)
    if stage in ("dit", "all") and final and _left(session) > _LEAST_TRAINING_S:
        final = train_dit(session, arguments.dit_budget_s, batch_size=arguments.batch_size)
    trained = (session.work_dir / "dit-state.pt").exists()
    if not session.leads or not trained or stage not in ("eval", "export", "all"):
        return
    if stage in ("export", "all"):
        export(session, arguments.export_dir or session.work_dir / "demo_model")
    left = session.deadline - time.monotonic()  # the other ranks are not asked: they have gone on
    if stage == "eval" or (stage == "all" and left > _LEAST_EVALUATION_S):
        _evaluate(session, arguments)


def _left(session: Session) -> float:
    """Seconds left to this command, as the first rank's clock has it."""
    return session.ranks.from_first([session.deadline - time.monotonic()])[0]


def _evaluate(session: Session, arguments: argparse.Namespace) -> None:
    """Judge the averaged weights with the plain sampler; write the report and one picture for each kind of case."""
    transformer, encoder, tokenizer = averaged_networks(session)
    sampler = PlainSampler(
        transformer,
        encoder,
        load_frozen(session),
        tokenizer,
        text_length=session.sizes.text_length,
        guidance_scale=arguments.guidance_scale,
        num_steps=2 if session.trial else arguments.num_steps,
    )
    chosen = cases()[::24] if session.trial else cases()
    results, clips = evaluate(sampler, chosen)
    folder = arguments.report_dir or session.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder / "evaluation.json", results)
    for kind in ("one", "two", "image"):
        shown = [clip for clip, case in zip(clips, chosen, strict=True) if case.kind == kind]
        write_png(folder / f"sheet-{kind}.png", contact_sheet(shown, num_columns=8 if kind == "image" else 2))
    session.log("evaluation", guidance_scale=arguments.guidance_scale, **summary(results))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = parser.add_argument
    add("--work-dir", type=Path, required=True, help="folder of the run: states, logs, finished parts")
    add("--stage", choices=("text", "vae", "dit", "eval", "export", "all"), default="all")
    add("--time-limit-s", type=float, default=540.0, help="seconds this command may take")
    add("--text-budget-s", type=float, default=60.0, help="training time of the text encoder over all commands")
    add("--vae-budget-s", type=float, default=170.0, help="training time of the autoencoder over all commands")
    add("--dit-budget-s", type=float, default=900.0, help="training time of the transformer over all commands")
    add("--batch-size", type=int, default=128, help="clips of a step, for each device")
    add("--guidance-scale", type=float, default=4.0, help="for the evaluation")
    add("--num-steps", type=int, default=20, help="sampling steps of the evaluation")
    add("--export-dir", type=Path, help="where the checkpoint goes; default: WORK_DIR/demo_model")
    add("--report-dir", type=Path, help="where the evaluation goes; default: WORK_DIR")
    add("--pack-resume", type=Path, metavar="DIR", help="at the end, write what another machine needs to go on")
    add("--unpack-resume", type=Path, metavar="DIR", help="at the start, take over what was packed")
    add(
        "--from-checkpoint",
        type=Path,
        metavar="DIR",
        help="go on from an exported checkpoint",
    )
    add("--no-compile", action="store_true", help="run the transformer's blocks as they are")
    add("--seed", type=int, default=0)
    add("--smoke", action="store_true", help="prove the script in a minute with tiny networks; learns nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
