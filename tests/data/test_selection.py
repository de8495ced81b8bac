"""Which documents are kept, and the report of those that are not."""

import json

import numpy as np
import pytest

from dsv3_jax.data import corpus, selection
from tests import settings


def words(seed, count=60):
  rng = np.random.default_rng(seed)
  return ' '.join(str(x) for x in rng.integers(0, 10**6, count))


def records():
  """Texts of which some break a rule, and two conversations."""
  turns = [{'role': 'user', 'content': 'a'}]
  turns.append({'role': 'assistant', 'content': 'b'})
  texts = [words(seed) for seed in range(40)]
  texts += ['short', texts[3].upper(), texts[5] + ' more', 'x\n' * 99, 'short']
  lines = [{'text': text} for text in texts]
  return [*lines, {'messages': turns}, {'messages': turns}]


@pytest.fixture
def source(tmp_path):
  lines = [json.dumps(record) for record in records()]
  path = tmp_path / 'a.jsonl'
  path.write_text('\n' + '\n'.join(lines), encoding='utf-8')  # line 1 is empty
  return path


def make(source, **changes):
  named = {f'data__{name}': x for name, x in changes.items()}
  fixed = {
    'data__source': str(source),
    'data__cache_dir': str(source.parent / 'cache'),
    'data__valid_fraction': 0.1,
  }
  return settings.small(**(fixed | named)).data


def select(cfg, **options):
  opened = corpus.open_corpus(cfg)
  chosen = selection.select(cfg, opened, say=print, **options)
  return opened, chosen


def test_rules_are_counted_with_their_first_places(source):
  cfg = make(
    source,
    filters__min_chars=10,
    filters__gopher_repetition=True,
    dedup__exact=True,
    dedup__near=0.8,
  )
  opened, chosen = select(cfg)
  report = chosen.report
  place = {opened.train.place(i): i for i in range(len(opened.train))}
  held = {opened.valid.place(i) for i in range(len(opened.valid))}
  dropped = report['dropped']
  line = lambda number: f'{source}:{number + 2}'  # of a record by its index
  short = [line(i) for i in (40, 44) if line(i) not in held]
  assert (
    short and [x['place'] for x in dropped['min_chars']['examples']] == short
  )
  assert dropped['min_chars']['bytes'] == 5 * len(short)
  pairs = {41: (3, 'exact_duplicate'), 42: (5, 'near_duplicate')}
  pairs |= {46: (45, 'exact_duplicate')}
  gone = set(short)
  for late, (first, rule) in pairs.items():
    if line(late) in held:
      continue
    rule = 'like_held_out' if line(first) in held else rule
    example = {'place': line(late), 'partner': line(first)}
    assert example in dropped[rule]['examples']
    gone.add(line(late))
  if line(43) not in held:
    assert dropped['duplicate_lines']['examples'][0]['place'] == line(43)
    gone.add(line(43))
  assert len(gone) >= 5
  assert chosen.kept.tolist() == sorted(
    set(place.values()) - {place[x] for x in gone}
  )
  counts = sum(entry['documents'] for entry in dropped.values())
  assert counts == len(gone) == report['documents'] - report['kept_documents']
  assert report['kept_documents'] == len(chosen.kept)
  sizes = [len(corpus.document_text(x).encode()) for x in opened.train]
  assert report['bytes'] == sum(sizes)
  assert report['kept_bytes'] == sum(sizes[i] for i in chosen.kept.tolist())
  assert list(dropped) == sorted(
    dropped, key=lambda x: -dropped[x]['documents']
  )


def test_what_is_like_held_out_text_is_dropped(source):
  cfg = make(source, dedup__exact=True)
  opened = corpus.open_corpus(cfg)
  held = opened.valid[0]['text']
  body = source.read_text() + '\n' + json.dumps({'text': held + ' '})
  for number in range(60):  # until one of the copies is in the training part
    source.write_text(body + ('\n' + json.dumps({'text': held})) * number)
    opened, chosen = select(cfg)
    if 'like_held_out' in chosen.report['dropped']:
      break
  (example, *_) = chosen.report['dropped']['like_held_out']['examples']
  assert example['partner'] == opened.valid.place(0)
  texts = [corpus.document_text(opened.train[i]) for i in chosen.kept.tolist()]
  assert all(text.strip() != held for text in texts)


def test_conversations_keep_the_rules_of_texts(source):
  """All texts are too short here; only the second conversation is a copy."""
  cfg = make(source, filters__min_chars=10**6)
  opened, chosen = select(cfg)
  kept = [opened.train[i] for i in chosen.kept.tolist()]
  assert kept and all('messages' in record for record in kept)


@pytest.mark.nightly
def test_any_number_of_processes_chooses_the_same(source, monkeypatch):
  monkeypatch.setattr(selection, 'CHUNK', 7)
  cfg = make(
    source, filters__min_chars=10, filters__languages=('en', 'zxx', 'de'),
    dedup__exact=True, dedup__near=0.8,
  )  # fmt: skip
  _, alone = select(cfg)
  _, chosen = select(cfg, num_workers=2)
  assert chosen.report == alone.report
  assert chosen.digest == alone.digest


def test_progress(source, monkeypatch):
  monkeypatch.setattr(selection.scan, 'QUIET_SECONDS', 0.0)
  lines = []
  cfg = make(source, filters__min_chars=10)
  opened = corpus.open_corpus(cfg)
  selection.select(cfg, opened, say=lines.append)
  count = len(opened.train)
  assert lines[-1].startswith(f'judged {count} of {count} documents (100%), ')
  assert lines[-1].endswith(' min left')
