"""Breaks one thing at a time in a copy of the tree, and says whether the tests that guard it saw it. Run by hand, half
an hour on 2 cores:

    python tests/by_hand/mutations.py            all, and a table
    python tests/by_hand/mutations.py 3 7        these
    python tests/by_hand/mutations.py --list     what they are

A mutation is a text that stands once in a file, what takes its place, and the tests that must turn red: each belongs to
the default suite. Before the first mutation the same tests must be green. CONTRIBUTING.md has the list.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutation(NamedTuple):
    what: str
    file: str
    old: str  # stands once in the file
    new: str
    tests: str  # pytest's arguments


RECURRENT = "tests/contract/test_recipes.py -k recurrent_lm"
MUTATIONS = [
    Mutation(
        "drop the all-reduce of the label count",
        "recipes/recurrent_lm.py",
        "labels = ranks.sum_over_ranks(",
        "labels = sum(",
        RECURRENT,
    ),
    Mutation(
        "forget the factor that undoes DeepSpeed's division by the accumulation steps (Adam hides it: norms show)",
        "lib/run/run.py",
        "veto_if_not_finite(loss) * accumulation_steps * mesh.gradient_size()",
        "veto_if_not_finite(loss) * mesh.gradient_size()",
        RECURRENT,
    ),
    Mutation(
        "shift the labels: each token is to predict itself",
        "lib/data/blocks.py",
        "labels[row, : len(part) - 1] = part[1:]",
        "labels[row, : len(part) - 1] = part[:-1]",
        "tests/data/test_data.py",
    ),
    Mutation(
        "let a rank take neighbouring rows, by which other rows meet in a step",
        "lib/data/batches.py",
        "local = micro_batches[rank::data_parallel_size]",
        "local = (micro_batches + rank)[::data_parallel_size] % batch_size",
        RECURRENT,
    ),
    Mutation(
        "count the fillers of an evaluation as rows",
        "lib/distributed/ranks.py",
        "real = row >= 0",
        "real = row >= -1",
        RECURRENT,
    ),
    Mutation(
        "swap forward and reverse order of the ranks' rows",
        "lib/distributed/ranks.py",
        "return torch.cat(parts)",
        "return torch.cat(parts[::-1])",
        "tests/contract/test_recipes.py -k 'semantic_search and trains_as_plain'",
    ),
    Mutation(
        "save on rank 0 alone",
        "lib/run/checkpoint_writing.py",
        "        owned, shared = owned_pieces(engine), layouts(engine)",
        "        owned, shared = owned_pieces(engine) if ranks.rank() == 0 else [], layouts(engine)",
        "tests/run/test_checkpoints.py -k 'resumes_every_other'",
    ),
    Mutation(
        "round the buffers of stage 3 to the training's precision",
        "lib/distributed/loading.py",
        "tensor.data = right[name].to(tensor.device)",
        "tensor.copy_(right[name])",
        "tests/distributed/test_stages.py",
    ),
    Mutation(
        "take stage 0 as DeepSpeed has it",
        "lib/distributed/repairs.py",
        "    if engine.zero_optimization():\n        return\n    optimizer = engine.optimizer",
        "    return\n    optimizer = engine.optimizer",
        "tests/contract/test_recipes.py -k 'recurrent_lm and bf16'",
    ),
    Mutation(
        "let a loss that is infinite change the weights",
        "lib/distributed/repairs.py",
        "return loss * torch.where(loss.isfinite(), 1.0, torch.nan)",
        "return loss",
        "tests/run/test_checkpoints.py -k 'infinite_loss'",
    ),
    Mutation(
        "export what a rank holds and not what all hold",
        "lib/distributed/export.py",
        "with deepspeed.zero.GatheredParameters(to_gather, enabled=self._partitioned):",
        "with deepspeed.zero.GatheredParameters(to_gather, enabled=False):",
        RECURRENT,
    ),
    Mutation(
        "decay biases and norms too",
        "lib/distributed/optimizer.py",
        '"weight_decay": 0.0 if is_vector else cfg.weight_decay',
        '"weight_decay": cfg.weight_decay',
        "tests/models/test_model.py -k 'decay or norms or pre_trained'",
    ),
    Mutation(
        "believe a checkpoint without its checksums",
        "lib/run/checkpoint_files.py",
        'if _checksum_of_file(file) != facts["xxh3_128"]:',
        "if False:",
        "tests/test_faults.py -k faulty_checkpoints",
    ),
    Mutation(
        "start the learning-rate schedule anew after a resume",
        "lib/run/checkpoints.py",
        'schedule.load_state_dict(manifest["schedule"] | of_groups)',
        "pass",
        RECURRENT,
    ),
    Mutation(
        "resume with Adam's states left at zero",
        "lib/run/checkpoint_files.py",
        'for kind in [WEIGHT, *manifest["kinds"]]:\n                target',
        "for kind in [WEIGHT]:\n                target",
        RECURRENT,
    ),
    Mutation(
        "draw dropout by what ran before",
        "lib/run/run.py",
        "set_seed(int(np.random.SeedSequence((cfg.seed, step, mesh.dropout_rank())).generate_state(1)[0]))",
        "pass",
        "tests/contract/test_recipes.py -k 'text_classification and interrupted'",
    ),
    Mutation(
        "export the last weights where the best were asked for",
        "lib/run/run.py",
        "        self.checkpoints.take_best()\n",
        "",
        "tests/run/test_checkpoints.py -k the_best_is_exported",
    ),
    Mutation(
        "let an unknown key of the DeepSpeed JSON pass",
        "lib/settings/ds_config.py",
        "        elif key not in known:",
        "        elif False:",
        "tests/settings/test_settings.py -k a_mistake_in_the_json",
    ),
    Mutation(
        "delete the run that is to be overwritten before the new one is checked",
        "lib/run/folder.py",
        "self._old = {path: _identity(path) for top in found for path in _contents_first(top)}",
        "[path.unlink() for top in found for path in _contents_first(top) if not path.is_dir()]",
        "tests/run/test_runs.py -k overwrite",
    ),
    Mutation(
        "count an evaluation as part of the steps",
        "lib/run/run.py",
        "            self.metrics.end_interruption()\n",
        "",
        "tests/run/test_runs.py -k 'only_steps or what_follows'",
    ),
    Mutation(
        "forget the warm-up of a constant learning rate",
        "lib/distributed/optimizer.py",
        'name = "constant_with_warmup" if cfg.lr_schedule == "constant" else cfg.lr_schedule',
        "name = cfg.lr_schedule",
        "tests/distributed/test_schedule.py",
    ),
    Mutation(
        "take the equal documents of a step for wrong answers",
        "recipes/semantic_search.py",
        "answers = same_query.float() @ same_document.float() > 0",
        "answers = same_query & same_document",
        "tests/contract/test_methods.py tests/data/test_data_cases.py",
    ),
    Mutation(
        "let a CSV's row have one cell more than its header",
        "lib/data/sources.py",
        "if len(cells) > len(known):",
        "if False:",
        "tests/data/test_data_cases.py",
    ),
    Mutation(
        "take the first devices and not those of CUDA_VISIBLE_DEVICES",
        "lib/launch/devices.py",
        "        if self.variable:\n            return",
        "        if False:\n            return",
        "tests/launch/test_start.py -k devices",
    ),
    Mutation(
        "export one rank's part of a matrix that a tensor-parallel group shares",
        "lib/distributed/export.py",
        "    if shared is None:\n",
        "    if True:\n",
        "tests/distributed/test_parallel.py -k trains",
    ),
    Mutation(
        "clip by the norm of one rank's part of the gradients",
        "lib/distributed/repairs.py",
        "    if mesh.tensor_size() > 1 or mesh.pipeline_size() > 1:\n",
        "    if mesh.tensor_size() > 9:\n",
        "tests/distributed/test_parallel.py -k trains",
    ),
    Mutation(
        "give the ranks of a tensor-parallel group rows of their own",
        "lib/distributed/mesh.py",
        "    return _rank_in_stage() // (_mesh.tensor_size * _mesh.sequence_size)\n",
        "    return dist.get_rank() % data_parallel_size()\n",
        "tests/distributed/test_parallel.py -k trains",
    ),
    Mutation(
        "divide gradients by the groups that share rows, and not by the ranks that sum gradients",
        "lib/run/run.py",
        "accumulation_steps * mesh.gradient_size()\n",
        "accumulation_steps * mesh.data_parallel_size()\n",
        "tests/contract -k causal_lm",
    ),
    Mutation(
        "give every rank of a sequence-parallel group the first part of the rows",
        "lib/data/batches.py",
        "    begin, end = length * mesh.sequence_rank() // size, length * (mesh.sequence_rank() + 1) // size\n",
        "    begin, end = 0, length // size\n",
        "tests/distributed/test_parallel.py -k trains",
    ),
    Mutation(
        "take this rank's part of the vocabulary for the first part",
        "lib/distributed/vocabulary.py",
        "        vocab_start_index=_part.vocab_start_index, vocab_end_index=_part.vocab_end_index,\n",
        "        vocab_start_index=0, vocab_end_index=logits.shape[-1],\n",
        "tests/distributed/test_parallel.py -k trains",
    ),
    Mutation(
        "count a weight that two stages of a pipeline have twice in the gradient norm",
        "lib/distributed/pipeline.py",
        "ds_pipe_replicated = stage > 0 and name == tied\n",
        "ds_pipe_replicated = False\n",
        "tests/distributed/test_parallel.py -k trains",
    ),
    Mutation(
        "balance experts over a whole micro-batch, and not over each row",
        "lib/models/experts.py",
        "row_tokens = mesh.sum_over_sequence(tokens)",
        "row_tokens = mesh.sum_over_sequence(tokens).mean(1, keepdim=True)",
        "tests/models/test_experts.py",
    ),
    Mutation(
        "balance experts by the tokens of this rank's part of the rows",
        "lib/distributed/mesh.py",
        "        dist.all_reduce(total, group=_mesh.row_group)\n",
        "        pass\n",
        "tests/distributed/test_parallel.py -k 'trains and sequence'",
    ),
    Mutation(
        "take the experts of each rank of an expert-parallel group for the first ones",
        "lib/distributed/expert_parallel.py",
        "first = layer.num_experts, width * hidden, layer.ep_rank * count",
        "first = layer.num_experts, width * hidden, 0",
        "tests/distributed/test_parallel.py -k writer4",
    ),
    Mutation(
        "export the experts of one rank of an expert-parallel group for all",
        "lib/distributed/expert_parallel.py",
        "    dist.all_gather(found, mine, group=group)\n",
        "    found = [mine for _ in found]\n",
        "tests/distributed/test_parallel.py -k 'trains and expert'",
    ),
    Mutation(
        "let the loss fall on the line break behind an answer",
        "lib/data/conversations.py",
        "end = len(whole.rstrip())",
        "end = len(whole)",
        "tests/data/test_conversations.py",
    ),
    Mutation(
        "give an answer that is cut off an end",
        "lib/data/conversations.py",
        "return ids[:-1], labels[1:], len",
        "labels[-1] = 2  # <|im_end|>\n    return ids[:-1], labels[1:], len",
        "tests/data/test_conversations.py",
    ),
    Mutation(
        "let the conversations of a row see each other",
        "lib/models/packing.py",
        "mask = attention_mask[..., begin:end, begin:end] if needs_mask else None",
        "mask = None\n        key, value = key.flip(2), value.flip(2)",
        "tests/models/test_packing.py",
    ),
    Mutation(
        "take no gradient from the last piece of a loss in pieces",
        "lib/models/output_layer.py",
        "for part in parts",
        "for part in [*parts[:-1], [tensor.detach() for tensor in parts[-1]]]",
        "tests/models/test_packing.py",
    ),
    Mutation(
        "take the margin of two answers the wrong way round",
        "recipes/dpo.py",
        "return chosen - rejected",
        "return rejected - chosen",
        "tests/contract/test_methods.py",
    ),
    Mutation(
        "let ranks that share rows go on from their own part of a log-probability",
        "lib/distributed/mesh.py",
        "total: torch.Tensor = differentiable_all_reduce(tensor, group=_mesh.row_group)",
        "total: torch.Tensor = tensor  # differentiable_all_reduce(tensor, group=_mesh.row_group)",
        "tests/contract/test_recipes.py -k dpo",
    ),
    Mutation(
        "cut the wrong one of an adapter's matrices where its layer is cut",
        "lib/distributed/loading.py",
        'part = {"colwise": "lora_B", "rowwise": "lora_A"}.get(style)',
        'part = {"colwise": "lora_A", "rowwise": "lora_B"}.get(style)',
        "tests/contract/test_recipes.py -k sft",
    ),
    Mutation(
        "give what is before the output layer no gradient of the loss",
        "lib/models/output_layer.py",
        "[checkpoint(found_in, *part, use_reentrant=False) if len(parts) > 1 else found_in(*part) for part in parts]",
        "[found_in(part[0].detach(), part[1]) for part in parts]",
        "tests/models/test_output_layer.py",
    ),
    Mutation(
        "give the reference of other pairs than those that the steps take",
        "lib/data/batches.py",
        "return np.unique(np.concatenate([step_rows[step] for step in",
        "return np.unique(np.concatenate([step_rows[step + 1] for step in",
        "tests/data/test_data.py",
    ),
    Mutation(
        "compute anew, at a resume, what the model before training gave",
        "lib/run/kept.py",
        "if name not in self.values:",
        "if True:",
        "tests/run/test_runs.py",
    ),
    Mutation(
        "resume beside other frozen weights",
        "lib/run/checkpoints.py",
        'if not math.isclose(manifest.get("frozen", frozen), frozen, rel_tol=1e-6):',
        "if False:",
        "tests/run/test_runs.py",
    ),
    Mutation(
        "let each random word of a span count for one",
        "recipes/word_embeddings.py",
        "(self.cfg.negatives / self.cfg.span)",
        "self.cfg.negatives",
        "tests/contract/test_methods.py",
    ),
    Mutation(
        "number the machines that are left by their old numbers",
        "lib/launch/team.py",
        "number = meeting.members.index(self.node)",
        "number = self.node",
        "tests/machines/test_operations.py -k numbered_anew",
    ),
    Mutation(
        "compare what machines have by its names, and not by its sizes",
        "lib/launch/facts.py",
        "{_size(file)}",
        "",
        "tests/machines/test_operations.py -k names_and_sizes",
    ),
    Mutation(
        "let any machine's word on the end of the run count",
        "lib/launch/team.py",
        'if first is not None and first["finished"]:',
        'if any(end and end["finished"] for end in ends):',
        "tests/machines/test_machines.py -k verdict",
    ),
    Mutation(
        "let the other machines of a hostfile train on when the command there is killed",
        "lib/launch/supervise.py",
        "for _ in range(2):",
        "for _ in range(0):",
        "tests/machines/test_machines.py -k starts_and_ends_all",
    ),
    Mutation(
        "keep what a rank on another machine says of its fault there",
        "lib/launch/team.py",
        'for line in end["words"] if end is not None and self.node == 0 else ():',
        "for line in ():",
        "tests/machines/test_operations.py -k seen_on_the_first",
    ),
    Mutation(
        "name the rank that waits for the one it waits for",
        "lib/run/slowest.py",
        "shares.index(least)",
        "shares.index(max(shares))",
        "tests/run/test_slowest.py",
    ),
    Mutation(
        "take the reduce-scatter of stage 3 for free",
        "lib/compare/theory.py",
        "gradients, parameters = ring * facts",
        "gradients, parameters = 0 * facts",
        "tests/machines/test_link.py",
    ),
]


def run(tests: str, tree: Path) -> tuple[bool, str, float]:
    """(whether all tests passed, pytest's last line, seconds)"""
    started = time.monotonic()
    command = f"{sys.executable} -m pytest -x -q -o addopts= {tests}"
    done = subprocess.run(
        command, shell=True, cwd=tree, capture_output=True, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    )
    return done.returncode == 0, done.stdout.strip().splitlines()[-1], time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="which (default: all)")
    parser.add_argument("--list", action="store_true", help="print what they are")
    options = parser.parse_args()
    chosen = [
        (number, mutation)
        for number, mutation in enumerate(MUTATIONS, 1)
        if number in (options.numbers or range(1, len(MUTATIONS) + 1))
    ]
    if options.list:
        for number, mutation in chosen:
            print(f"{number:>3}  {mutation.what}: {mutation.file}")
        return
    rows, survived = [], 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "runs", ".venv", "__pycache__", ".*_cache"))
        for tests in dict.fromkeys(mutation.tests for _, mutation in chosen):
            passed, said, seconds = run(tests, tree)
            print(f"unbroken: {tests}: {said} ({seconds:.0f} s)", flush=True)
            if not passed:
                sys.exit("the tests must pass before anything is broken")
        for number, mutation in chosen:
            file = tree / mutation.file
            text = file.read_text(encoding="utf-8")
            if text.count(mutation.old) != 1:
                sys.exit(
                    f"{number}, {mutation.what}: its text stands {text.count(mutation.old)} times "
                    f"in {mutation.file}, not once; bring it up to date"
                )
            file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            passed, said, seconds = run(mutation.tests, tree)
            file.write_text(text, encoding="utf-8")
            survived += passed
            rows.append(
                f"| {number} | {mutation.what} | `{mutation.file}` | "
                f"{'NOT SEEN' if passed else 'red'} | {seconds:.0f} |"
            )
            print(f"{rows[-1]} {said}", flush=True)
    print("\n| | what is broken | in | the tests | seconds |\n| --- | --- | --- | --- | --- |\n" + "\n".join(rows))
    sys.exit(survived > 0)


if __name__ == "__main__":
    main()
