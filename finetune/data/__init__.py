"""Raw rows -> a mix -> a corpus of tokens -> packed rows. Installed as `koala_local.finetune.data`.

command.py     `koala data`; look.py, report.py and views.py show what was built
build.py       a recipe -> a corpus folder, in stages that outlive a kill:
  recipe.py, download.py             which sources, and where their raw files are
  raw_files.py, sources/             the rows of a file; a row -> examples (examples.py)
  mix.py                             what stays: cleaning.py, contamination.py, duplicates.py; workers.py spreads it
  tokens.py, corpus_writer.py        examples -> token ids with their mask -> files
corpus.py      these files, memory-mapped
packing.py     what a trainer takes: rows of a corpus, planned for all epochs; pieces.py cuts what is longer
new_tokenizer.py                     `koala data tokenizer`
"""
