"""Throw grammar-generated and damaged input at every parser and print what happened.

    python -P tests/fuzz/run.py [--frames 1000000] [--seed 1] [--target NAME ...] [--files]
    python -P tests/fuzz/run.py --collect 20000        # look for inputs that reach new code, add them to the corpus

A crash, or more memory than a target's bound, is printed with the input and makes the exit status 1. `--files` adds
the parsers of weights files, which load torch.
"""

import argparse
import base64
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fuzz.engine import campaign, collect, save_corpus
from fuzz.machines import STATEFUL
from fuzz.targets import STATELESS

SHOWN = 5
"""Crashes of one target that are printed, each kind once."""


def chosen(options):
    targets = [*STATELESS, *STATEFUL]
    if options.files:
        from fuzz.files import FILES

        targets += FILES
    return [target for target in targets if not options.target or target.name in options.target]


def show(report):
    refused = ", ".join(f"{name} {count}" for name, count in report.refused.most_common())
    rate = report.frames / max(report.seconds, 1e-9)
    print(
        f"| {report.name} | {report.frames} | {report.inputs} | {report.accepted} | {refused} | {len(report.crashes)} "
        f"| {report.peak_bytes // 1024} | {report.grown_kib} | {report.slowest_s * 1000:.1f} | {rate:.0f} |",
        flush=True,
    )
    kinds = {why.splitlines()[-1][:60]: (data, why) for data, why in reversed(report.crashes + report.excess)}
    for data, why in list(kinds.values())[:SHOWN]:
        print(f"\n    {why}\n    input: {base64.b85encode(data[:4000]).decode()}\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000, help="all targets together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target", nargs="*")
    parser.add_argument("--files", action="store_true", help="GGUF and safetensors, too")
    parser.add_argument("--collect", type=int, metavar="INPUTS", help="grow the corpus instead")
    options = parser.parse_args()
    targets = chosen(options)
    if options.collect:
        for target in targets:
            kept = collect(target, options.collect, options.seed)
            save_corpus(target.name, kept)
            print(f"{target.name}: {len(kept)} inputs, {sum(len(data) for data, _ in kept)} bytes", flush=True)
        return 0
    print("| target | frames | inputs | accepted | refused | crashes | peak KiB | grown KiB | slowest ms | frames/s |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    whole = sum(target.weight for target in targets)
    reports = []
    for target in targets:
        reports.append(campaign(target, int(options.frames * target.weight / whole) + 1, options.seed))
        show(reports[-1])
    frames, crashes = sum(r.frames for r in reports), sum(len(r.crashes) + len(r.excess) for r in reports)
    print(f"\n{frames} frames, {crashes} crashes")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
