"""What the recipes share, in folders whose imports point down; tests/test_house.py keeps the order:

    errors, progress < settings < distributed < data < models < run < scores < recipes

    errors        mistakes that a user can correct, exit codes, paths as a user types them; imports nothing of lib
    progress      work that takes long shows how far it has come; imports nothing of lib
    settings      YAML and command line, the DeepSpeed JSON, the settings of every run; read before torch is imported
    distributed   other ranks and partitioned state: process groups, loading, optimizer, ZeRO's state, export
    data          columns, rows and padding: sources, checked rows, samples, batches, blocks of tokens
    models        weights, architectures, tokenizers, token losses; the same on any number of ranks
    run           the run folder and the console: metrics, checkpoints, a recipe's command line
    scores        numbers from predictions: evaluation, baselines, inference, generation, search
    compare       stands beside: runs recipes from outside, and reports what they measured; it may use launch
    launch        stands beside: processes of launch.sh before the ranks, and the table of results; no torch at import

The training step is in the recipe, and nothing here calls the engine's forward, backward or step in training:

    run.attach(engine, ...)                                   # after deepspeed.initialize
    for step, micro_batches in run.steps(train, collate):     # this rank's share of one optimizer step
        for batch in micro_batches:
            loss = ... .sum() / labels                        # labels: of the whole step, over all ranks
            engine.backward(run.undivided(loss))
            engine.step()
        run.log_step(step, step_loss, tokens=...)
    return run.finish(...)

Where to look, and where to add:

    where the loss is divided          recipes/x.py, in the loop; run.undivided (run/run.py) undoes DeepSpeed's division
    which rows a rank gets             data/batches.py
    what a checkpoint holds            run/checkpoints.py (save, load), distributed/zero_state.py (what a rank has),
                                       run/checkpoint_writing.py and checkpoint_files.py (the files)
    a DeepSpeed key that is allowed    settings/ds_config.py
    a built-in corpus                  data/samples.py

A new line belongs to the first of these that it fits: the formula in a recipe's docstring (the recipe); a process of
its own before or after the ranks (launch, compare); other ranks or partitioned state (distributed); a column, a row or
padding (data); a weight, an architecture, a tokenizer (models); a file of the run folder or a line on the console
(run); a score (scores); a key of YAML or JSON (settings).
"""
