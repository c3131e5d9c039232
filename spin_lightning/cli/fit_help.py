"""The help page of `fit` and `validate`: what most runs change, and where the rest is."""

from __future__ import annotations

from typing import Final

FIT_HELP_PAGE: Final = """\
usage: spin-lightning {command} --config FILE [--model.SETTING VALUE] [--data.SETTING VALUE] ...

{summary}

Every setting, by topic:
  --model.help SPIN                a variant's, such as FictitiousSPIN, AlphaSPIN or SFT
  --data.help SelfPlayDataModule   the data's
  --help all                       all of them, with Lightning's trainer (500 lines)

What most runs change; values on the command line replace those of the config:
  --model SPIN                     the variant; it comes before its settings
  --model.model PATH               hub id, folder or GGUF file of the model
  --model.beta 0.1                 temperature of the implicit reward; SPIN's lambda
  --model.learning_rate 1e-5       peak learning rate of the adapter
  --model.lora_r 16                rank of the adapter
  --model.quantization nf4         keep the frozen weights in 4 bits
  --model.epochs_per_iterate 1     passes over the rows of an iterate
  --data.data FILE                 file, folder, pattern or hub id of the answers
  --data.max_response_tokens 256   cap of real and generated responses
  --data.val_fraction 0.05         share of the examples to hold out
  --data.batch_size 8              pairs in a batch on one device
  --trainer.max_epochs 4           iterates times epochs_per_iterate
  --trainer.accelerator auto       auto, gpu or cpu
  --trainer.default_root_dir PATH  the run folder
  --seed_everything 0              seed
  --dry_run true                   print rows, tokens, memory and expected time, then stop
  --print_config                   print every setting with its value, then stop
"""
