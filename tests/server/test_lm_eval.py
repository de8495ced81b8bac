"""lm-eval against `dsv3 serve`, a process: scores are the model's own.

`make nightly`. The tasks are ours; nothing is fetched.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import scipy.special

import dsv3_jax
from dsv3_jax.checkpoint.hf import kept_files
from dsv3_jax.data import tokenizer as tokenizers
from tests import limits, tolerances
from tests.checkpoint.hf import exchanged
from tests.server import web

pytestmark = pytest.mark.nightly
ROOT = pathlib.Path(__file__).resolve().parents[2]
QUESTIONS = ('Hello, world', 'x = 1\n\nx =', 'd\u00e9j\u00e0', '\u4f60\u597d')
CHOICES = (' world', ' x = 1', '!', ' d\u00e9j\u00e0 vu')
COUNT, LENGTH = 8, 128  # tokens of an answer; of the context
_CODE = """
import json, sys
import lm_eval, lm_eval.tasks

job = json.load(sys.stdin)
tasks = lm_eval.tasks.TaskManager(
  include_path=job.pop('folder'), include_defaults=False
)
path = job.pop('output')
results = lm_eval.simple_evaluate(
  task_manager=tasks, log_samples=True, bootstrap_iters=0, **job
)
rows = {
  name: [[row['doc_id'], row['filtered_resps']] for row in samples]
  for name, samples in results['samples'].items()
}
with open(path, 'w') as file:
  json.dump({'rows': rows, 'scores': results['results']}, file)
"""
# How prompts come to the server -> arguments of lm-eval's model. With
# `add_bos_token` the folder's tokenizer begins each text with bos; what is sent
# as text spells it.
WAYS = {
  'ids': {'tokenized_requests': True},
  'ids and bos': {'tokenized_requests': True, 'add_bos_token': True},
  'text': {'tokenized_requests': False, 'add_bos_token': True},
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """An exported folder, whose tokenizer adds bos, as published ones do."""
  cfg = exchanged.make('plain', model__vocab_size=280)
  assert cfg.model.max_seq_len == LENGTH
  trained = tokenizers.train(web.TEXTS * 30, 280)
  documents = kept_files.ours(trained, LENGTH)
  path = tmp_path_factory.mktemp('lm_eval') / 'tiny'
  weights = exchanged.random_weights(cfg)
  return exchanged.write(cfg, *weights, path, documents=documents)


@pytest.fixture(scope='module')
def model(folder):
  return dsv3_jax.load(folder)


@pytest.fixture(scope='module')
def address(folder):
  """Of a server on the folder, in a process of its own."""
  flags = [f'--checkpoint={folder}', '--port=0', '--nowarm_up']
  env = os.environ | {'JAX_PLATFORMS': 'cpu'}
  child = subprocess.Popen(
    [sys.executable, '-m', 'dsv3_jax.cli', 'serve', *flags],
    stdout=subprocess.PIPE,
    cwd=ROOT,
    env=env,
    text=True,
  )
  with child:
    yield child.stdout.readline().split()[-1]
    child.terminate()
    assert child.wait(limits.HANG) == 0


def evaluate(tmp_path, task, rows, name, address, args, **job):
  """What lm-eval says of a task: [[number, responses]], scores."""
  if importlib.util.find_spec('lm_eval') is None:
    pytest.skip('needs the extra `clients`')
  data = tmp_path / 'data.jsonl'
  lines = [json.dumps(row) + '\n' for row in rows]
  data.write_text(''.join(lines), encoding='utf-8')
  common = {
    'task': 'ours',
    'dataset_path': 'json',
    'dataset_kwargs': {'data_files': {'test': str(data)}},
    'test_split': 'test',
    'doc_to_text': '{{question}}',
  }
  tasks = tmp_path / 'tasks'
  tasks.mkdir()
  (tasks / 'ours.yaml').write_text(json.dumps(common | task))  # is YAML too
  path = {'local-completions': 'completions'}.get(name, 'chat/completions')
  args = {'model': 'tiny', 'base_url': f'{address}/v1/{path}'} | args
  job |= {'model': name, 'model_args': args, 'tasks': ['ours']}
  job |= {'folder': str(tasks), 'output': str(tmp_path / 'output.json')}
  offline = {'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'}
  subprocess.run(
    [sys.executable, '-c', _CODE],
    input=json.dumps(job),
    env=os.environ | offline,
    check=True,
    text=True,
    timeout=limits.HANG,
  )
  output = json.loads((tmp_path / 'output.json').read_text())
  return sorted(output['rows']['ours']), output['scores']['ours']


def log_probs(model, ids):
  """[T, V], of the token behind each."""
  return scipy.special.log_softmax(
    np.float64(model.logits(np.int32([ids]))[0]), axis=-1
  )


def greedy(model, ids):
  """The text of the likeliest tokens, up to a line's end."""
  new = []
  for _ in range(COUNT):
    log_V = log_probs(model, ids + new)[-1]
    best, second = np.sort(log_V)[:-3:-1]
    assert best > second + 1e-4, 'choose another question: it is a tie'
    new.append(int(np.argmax(log_V)))
    if new[-1] == model.tokenizer.eos_id:
      break
  return model.tokenizer.decode(new, True).split('\n')[0]


def encoded(model, text, args):
  has_bos = args.get('add_bos_token', False)
  return model.tokenizer.encode(text, add_bos=has_bos).tolist()


def choice_scores(model, question, choice, args):
  """Log-probability of a choice, and whether it is the greedy one."""
  before = len(encoded(model, question, args))
  ids = encoded(model, question + choice, args)
  log_TV = log_probs(model, ids)[before - 1 : -1]
  new = ids[before:]
  total = sum(row[x] for row, x in zip(log_TV, new, strict=True))
  return total, np.argmax(log_TV, axis=-1).tolist() == new


@pytest.mark.parametrize(
  ('way', 'batch'),
  [
    ('ids', {'batch_size': 4}),
    ('ids and bos', {'num_concurrent': 3}),
    ('text', {'batch_size': 1}),
  ],
)
def test_choices_have_the_model_s_own_log_probabilities(
  tmp_path, folder, model, address, way, batch
):
  scores = [
    [choice_scores(model, q, c, WAYS[way]) for c in CHOICES] for q in QUESTIONS
  ]
  best = [int(np.argmax([x for x, _ in row])) for row in scores]
  answers = [best[0], best[1], (best[2] + 1) % 4, best[3]]
  rows = [
    {'question': q, 'choices': CHOICES, 'answer': a}
    for q, a in zip(QUESTIONS, answers, strict=True)
  ]
  task = {
    'output_type': 'multiple_choice',
    'doc_to_choice': 'choices',
    'doc_to_target': 'answer',
    'target_delimiter': '',
    'metric_list': [{'metric': 'acc'}],
  }
  args = WAYS[way] | batch | {'tokenizer': str(folder), 'max_length': LENGTH}
  got, results = evaluate(
    tmp_path, task, rows, 'local-completions', address, args
  )
  for (_, answers), want in zip(got, scores, strict=True):
    tolerances.assert_close(
      [float(x) for x, _ in answers], [x for x, _ in want]
    )
    assert [str(x) == 'True' for _, x in answers] == [x for _, x in want]
  assert results['acc,none'] == 0.75


def generation_task():
  return {
    'output_type': 'generate_until',
    'doc_to_target': '{{answer}}',
    'metric_list': [{'metric': 'exact_match'}],
    'generation_kwargs': {
      'until': ['\n'],
      'do_sample': False,
      'temperature': 0.0,
      'max_gen_toks': COUNT,
    },
  }


def check_generation(tmp_path, address, name, args, texts, **job):
  """lm-eval gets these texts, and scores a half of them as right."""
  rows = [
    {'question': q, 'answer': text if i % 2 else 'quite another'}
    for i, (q, text) in enumerate(zip(QUESTIONS, texts, strict=True))
  ]
  got, results = evaluate(
    tmp_path, generation_task(), rows, name, address, args, **job
  )
  assert [answers for _, answers in got] == [[text] for text in texts]
  assert results['exact_match,none'] == 0.5


@pytest.mark.parametrize('way', ['ids', 'text'])
def test_completions_are_the_model_s_own(tmp_path, folder, model, address, way):
  texts = [greedy(model, encoded(model, q, WAYS[way])) for q in QUESTIONS]
  args = WAYS[way] | {'tokenizer': str(folder), 'max_length': LENGTH}
  args['batch_size'] = 4
  check_generation(tmp_path, address, 'local-completions', args, texts)


def test_chats_are_the_model_s_own(tmp_path, model, address):
  texts = [greedy(model, web.chat_ids(model.tokenizer, q)) for q in QUESTIONS]
  check_generation(
    tmp_path,
    address,
    'local-chat-completions',
    {'num_concurrent': 2},
    texts,
    apply_chat_template=True,
  )
