"""The routed product: all ways equal, dropless, with the right gradients."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.ops import expert_blocks
from dsv3_jax.ops import experts as expert_ops
from tests import gradients, tolerances
from tests.oracles import moe as oracle

PRODUCTS = ('blocks', 'dense', 'ragged')
DIM, WIDTH = 5, 6


def draw(seed, tokens, top_k, experts):
  """Tokens, gates and weights in float64, and distinct random ids."""
  rng = np.random.default_rng(seed)
  shapes = {
    'w_gate_EDF': (experts, DIM, WIDTH),
    'w_up_EDF': (experts, DIM, WIDTH),
    'w_down_EFD': (experts, WIDTH, DIM),
  }
  values = {
    'x_MD': rng.normal(size=(tokens, DIM)),
    'gates_MK': rng.uniform(0.1, 1.0, size=(tokens, top_k)),
    'experts': {name: rng.normal(size=s) for name, s in shapes.items()},
  }
  ids = [rng.permutation(experts)[:top_k] for _ in range(tokens)]
  return values, np.array(ids, np.int32).reshape(tokens, top_k)


@functools.partial(jax.jit, static_argnames=('product', 'block_size'))
def apply(values, ids_MK, product, block_size):
  return expert_ops.expert_ffn(
    values['x_MD'],
    ids_MK,
    values['gates_MK'],
    expert_ops.Experts(**values['experts']),
    expert_ops.ExpertOptions(product, block_size),
  )


@functools.partial(jax.jit, static_argnames=('product', 'block_size'))
def value_and_grads(values, ids_MK, dy_MD, product, block_size):
  def loss(values):
    y_MD = apply(values, ids_MK, product, block_size)
    return jnp.sum(y_MD * dy_MD), y_MD

  return jax.grad(loss, has_aux=True)(values)[::-1]


def oracle_apply(values, ids_MK):
  args = (values['x_MD'], ids_MK, values['gates_MK'], values['experts'])
  return oracle.moe_ffn(*args, None)


def f32(tree):
  return jax.tree.map(jnp.float32, tree)


def assert_all_equal(values, ids_MK, block_size, seed=0):
  """Every product: value as the oracle's, gradients as those of 'dense'."""
  rng = np.random.default_rng(seed)
  dy_MD = jnp.float32(rng.normal(size=values['x_MD'].shape))
  args = (f32(values), jnp.asarray(ids_MK), dy_MD)
  wanted = oracle_apply(values, ids_MK)
  _, wanted_grads = value_and_grads(*args, 'dense', block_size)
  for product in PRODUCTS:
    got, grads = value_and_grads(*args, product, block_size)
    tolerances.assert_close(got, wanted)
    tolerances.assert_trees_close(grads, wanted_grads)


@pytest.mark.parametrize('product', PRODUCTS)
def test_gradients_match_the_oracle(product):
  values, ids_MK = draw(0, tokens=7, top_k=2, experts=4)
  dy_MD = np.random.default_rng(1).normal(size=(7, DIM))
  args = (f32(values), jnp.asarray(ids_MK), jnp.float32(dy_MD))
  got, grads = value_and_grads(*args, product, 2)
  tolerances.assert_close(got, oracle_apply(values, ids_MK))
  loss = lambda v: np.sum(oracle_apply(v, ids_MK) * dy_MD)
  gradients.assert_matches(grads, loss, values)


@hypothesis.settings(deadline=None, max_examples=5, derandomize=True)
@hypothesis.given(
  tokens=st.integers(1, 33),
  experts=st.integers(1, 9),
  share=st.floats(0.0, 1.0),
  block_size=st.sampled_from([1, 2, 3, 8, 128]),
)
def test_all_products_agree_at_any_shape(tokens, experts, share, block_size):
  top_k = 1 + round(share * (experts - 1))
  values, ids_MK = draw(tokens, tokens, top_k, experts)
  assert_all_equal(values, ids_MK, block_size)


@hypothesis.settings(deadline=None, max_examples=20, derandomize=True)
@hypothesis.given(
  ids=st.lists(st.permutations(range(4)), min_size=9, max_size=9),
  block_size=st.sampled_from([2, 128]),
)
def test_all_products_agree_however_tokens_fall(ids, block_size):
  values, _ = draw(2, tokens=9, top_k=2, experts=4)
  assert_all_equal(values, np.array(ids, np.int32)[:, :2], block_size)


@pytest.mark.parametrize('block_size', [1, 4, 128])
@pytest.mark.parametrize('expert', [0, 2, 3])
def test_all_tokens_on_one_expert(block_size, expert):
  values, _ = draw(3, tokens=37, top_k=1, experts=4)
  ids_MK = np.full((37, 1), expert, np.int32)
  assert_all_equal(values, ids_MK, block_size)
  args = (f32(values), jnp.asarray(ids_MK), jnp.ones((37, DIM)))
  _, grads = value_and_grads(*args, 'blocks', block_size)
  for grad_EDF in grads['experts'].values():  # none for idle experts
    used_E = np.any(np.asarray(grad_EDF), axis=(1, 2))
    np.testing.assert_array_equal(used_E, np.arange(4) == expert)


@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(
  ids=st.lists(st.integers(0, 5), min_size=10, max_size=10),
  rows=st.sampled_from([1, 2, 3, 4, 8]),
)
def test_blocks_place_every_assignment_once(ids, rows):
  blocks = _blocks(jnp.array(ids, jnp.int32).reshape(5, 2), rows)
  source_J = np.asarray(blocks.source_J)
  row_A, expert_j = np.asarray(blocks.row_A), np.asarray(blocks.expert_j)
  np.testing.assert_array_equal(source_J[row_A], np.arange(10))
  assert np.sum(source_J < 10) == 10  # all the others are padding
  np.testing.assert_array_equal(expert_j[row_A // rows], ids)
  used = {row // rows for row in row_A}
  assert used == set(range(int(blocks.num_blocks)))  # blocks without gaps


@hypothesis.settings(deadline=None, max_examples=40, derandomize=True)
@hypothesis.given(
  sets=st.lists(st.permutations(range(9)), min_size=5, max_size=5),
  rows=st.sampled_from([1, 2, 3, 8]),
)
def test_blocks_leave_out_assignments_to_no_expert(sets, rows):
  """Ids past the last expert: no row, no block, and no room kept for them."""
  ids_A = np.minimum(np.array(sets)[:, :8], 6).reshape(-1)
  blocks = _blocks(jnp.array(ids_A, jnp.int32).reshape(5, 8), rows)
  source_J, row_A = np.asarray(blocks.source_J), np.asarray(blocks.row_A)
  (used_A,) = np.nonzero(ids_A < 6)
  np.testing.assert_array_equal(np.sort(source_J)[: len(used_A)], used_A)
  assert np.sum(source_J < 40) == len(used_A)
  np.testing.assert_array_equal(source_J[row_A[used_A]], used_A)
  assert np.all(row_A[ids_A == 6] >= len(source_J))
  blocks_E = -(-np.bincount(ids_A, minlength=7)[:6] // rows)
  assert blocks.num_blocks == blocks_E.sum()
  assert len(source_J) == (5 * 6 // rows + 6) * rows


@pytest.mark.parametrize('product', PRODUCTS)
@pytest.mark.parametrize('top_k', [2, 4])
@pytest.mark.parametrize('tokens', [1, 13])
def test_assignments_to_no_expert_take_part_in_nothing(product, top_k, tokens):
  """As if their gates were 0, also where a token has more ids than experts."""
  values, ids_MK = draw(9, tokens=tokens, top_k=top_k, experts=4)
  values['experts'] = {k: w[:3] for k, w in values['experts'].items()}
  ids_MK = np.where(np.arange(tokens)[:, None] % 5 == 4, 3, ids_MK)
  here_MK = ids_MK < 3
  assert not np.all(here_MK)
  dy_MD = np.random.default_rng(1).normal(size=(tokens, DIM))
  args = (f32(values), jnp.asarray(ids_MK), jnp.float32(dy_MD))
  got, grads = value_and_grads(*args, product, 2)

  def wanted(v):
    gates_MK = v['gates_MK'] * here_MK
    v = v | {'gates_MK': gates_MK}
    return oracle_apply(v, np.where(here_MK, ids_MK, 0))

  tolerances.assert_close(got, wanted(values))
  assert not np.any(np.asarray(grads['gates_MK'])[~here_MK])
  assert not np.any(np.asarray(grads['x_MD'])[4::5])
  gradients.assert_matches(grads, lambda v: np.sum(wanted(v) * dy_MD), values)


@functools.partial(jax.jit, static_argnums=1)
def _blocks(ids_MK, rows):
  return expert_blocks.make_blocks(ids_MK, 6, rows)


@pytest.mark.parametrize('rows', [1, 3, 16])
def test_unpermute_undoes_permute_up_to_the_sum_over_experts(rows):
  values, ids_MK = draw(4, tokens=11, top_k=3, experts=6)
  x_MD = jnp.round(8 * f32(values['x_MD']))  # sums of integers are exact
  blocks = _blocks(jnp.asarray(ids_MK), rows)
  there_JD = expert_blocks.permute(x_MD, blocks, 3)
  padding = np.asarray(blocks.source_J) == 33
  assert not np.any(np.asarray(there_JD)[padding])
  back_MD = expert_blocks.unpermute(there_JD, blocks, 3, 6)
  np.testing.assert_array_equal(back_MD, 3 * x_MD)


@pytest.mark.parametrize('product', PRODUCTS)
@pytest.mark.parametrize('tokens', [1, 24])
def test_bf16_stays_near_f32(product, tokens):
  values, ids_MK = draw(6, tokens=tokens, top_k=2, experts=4)
  dy_MD = jnp.float32(np.random.default_rng(7).normal(size=(tokens, DIM)))
  lower = jax.tree.map(jnp.bfloat16, values)
  lower['gates_MK'] = jnp.float32(values['gates_MK'])
  rest = (jnp.asarray(ids_MK), dy_MD)
  got, grads = value_and_grads(lower, *rest, product, 4)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), lower)
  want, want_grads = value_and_grads(exact, *rest, 'dense', 4)
  assert got.dtype == jnp.bfloat16
  assert grads['gates_MK'].dtype == jnp.float32
  assert grads['experts']['w_up_EDF'].dtype == jnp.bfloat16
  up = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
  tolerances.assert_close(up(got), want, 'bfloat16')
  tolerances.assert_trees_close(up(grads), want_grads, 'bfloat16')


def test_weight_gradients_add_up_in_f32():
  # 4096 equal terms: a bf16 sum would stop growing at 256 times the first.
  tokens = 4096
  values = {
    'x_MD': jnp.ones((tokens, 1), jnp.bfloat16),
    'gates_MK': jnp.ones((tokens, 1)),
    'experts': {
      'w_gate_EDF': jnp.full((1, 1, 1), 20.0, jnp.bfloat16),
      'w_up_EDF': jnp.ones((1, 1, 1), jnp.bfloat16),
      'w_down_EFD': jnp.ones((1, 1, 1), jnp.bfloat16),
    },
  }
  ids_MK, dy_MD = jnp.zeros((tokens, 1), jnp.int32), jnp.ones((tokens, 1))
  _, grads = value_and_grads(values, ids_MK, dy_MD, 'blocks', 128)
  for name in ('w_up_EDF', 'w_down_EFD'):  # silu(20) is 20
    assert float(grads['experts'][name][0, 0, 0]) == 20.0 * tokens


def test_blocks_survive_vmap_and_remat():
  values, ids_MK = draw(8, tokens=12, top_k=2, experts=4)
  ids = jnp.stack([ids_MK, ids_MK[::-1]])
  f = lambda v, ids: jnp.sum(jnp.sin(apply(v, ids, 'blocks', 4)))
  alone = [jax.grad(f)(f32(values), i) for i in ids]
  both = jax.vmap(jax.grad(f), in_axes=(None, 0))(f32(values), ids)
  again = jax.grad(jax.checkpoint(f))(f32(values), ids[0])
  tolerances.assert_trees_close(again, alone[0])
  for i in range(2):
    tolerances.assert_trees_close(jax.tree.map(lambda g: g[i], both), alone[i])
