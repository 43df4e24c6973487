"""From raw web dialogue to a trained Koala. Installed as `koala_local.finetune`.

data/          raw rows -> a mix -> a corpus -> packed rows; knows nothing of what follows
command.py     the command line: prepare.py makes the corpus, forecast.py the plan, launch.py starts the ranks
settings.py    the keys of a run; job.py: what each rank is given
plan.py        what it takes: memory.py, throughput.py
worker.py      what a rank does from its start to its end
model.py       transformers' LLaMA, with weights.py, adapters.py, attention.py, dropout.py, loss.py, sharding.py
train.py       the loop, with optimizer.py, checkpoint.py, evaluate.py; run_log.py and live_views.py tell of it
finish.py      what is left at the end: export.py, model_card.py
"""
