"""Timesteps: how policies are written, what is drawn, and what the losses of it are worth."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxpercept.diffusion import contribution
from jaxpercept.diffusion.schedule import GENPERCEPT, NoiseSchedule
from jaxpercept.diffusion.timesteps import (
    KINDS,
    PRESETS,
    USES,
    TimestepPolicy,
    drawn_policy,
    loss_weights,
    read_table,
    resolve,
    sample_timesteps,
)
from jaxpercept.errors import UserError
from jaxpercept.training import sharding

SD = NoiseSchedule(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon"
)
# Marigold's: zero terminal SNR.
ZERO_SNR = NoiseSchedule(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    rescale_betas_zero_snr=True,
)
SPECS = [
    *("uniform", "addp_depth", "addp_ris", "weighted:0,2,0,1,1", "ddim:10", "ddim:50", "ddpm:10"),
    *(
        "ddim_noise:10",
        "ddpm_noise:5",
        "p2",
        "p2:0.5,2",
        "min_snr",
        "min_snr:2",
        "logit_normal",
        "logit_normal:-0.5,0.7",
    ),
]
DRAWS = 40_000


def linear(total):
    return NoiseSchedule(num_train_timesteps=total)


@functools.cache
def compiled(spec, schedule, strata, steps):
    """`(key or keys, index) -> timesteps`."""
    run = functools.partial(sample_timesteps, spec, schedule=schedule, strata=strata)
    return jax.jit(jax.vmap(run, in_axes=(0, None)) if steps else run)


def draw(spec, seed, schedule=SD, count=DRAWS, strata=0, start=0):
    """Of one step, those of the examples from `start` on."""
    run = compiled(spec, schedule, strata, False)
    return np.asarray(run(jax.random.key(seed), start + jnp.arange(count)))


def draw_steps(spec, seed, index, schedule=SD, count=DRAWS, strata=0):
    """The same examples in many steps: [count, examples]."""
    run = compiled(spec, schedule, strata, True)
    return np.asarray(run(jax.random.split(jax.random.key(seed), count), jnp.asarray(index)))


def p_value(t, distribution):
    """Pearson's test; timesteps hardly expected are counted together with their neighbours."""
    assert distribution.sum() == pytest.approx(1, abs=1e-12)
    counts = np.bincount(t, minlength=len(distribution))
    assert not counts[distribution == 0].any()
    group = np.minimum(np.cumsum(distribution) * len(t) // 20, len(t) // 20 - 1).astype(int)
    _, group = np.unique(group, return_inverse=True)
    observed, expected = (np.bincount(group, x) for x in (counts, distribution * len(t)))
    usable = expected > 5
    observed = np.append(observed[usable], observed[~usable].sum())
    expected = np.append(expected[usable], expected[~usable].sum())
    return stats.chisquare(*(x[expected > 0] for x in (observed, expected)), sum_check=False).pvalue


# ---- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "schedule", "strata"),
    [
        *((spec, SD, 0) for spec in SPECS),
        *((spec, ZERO_SNR, 16) for spec in ("uniform", "ddim:10", "addp_ris")),
    ],
)
def test_what_is_drawn_follows_the_distribution(spec, schedule, strata):
    """Over all examples of a step; stratified, over many steps of one example."""
    distribution = TimestepPolicy.parse(spec).distribution(schedule)
    assert distribution.shape == (1000,)
    if strata:
        t = draw_steps(spec, 11, [70], schedule, strata=strata)[:, 0]
    else:
        t = draw(spec, 11, schedule)
    assert t.dtype == np.int32
    assert 1e-3 < p_value(t, distribution) < 1 - 1e-6
    # The test can tell: not so for a policy that is near by.
    other = "weighted:1,1.2" if spec == "uniform" else "uniform"
    shifted = TimestepPolicy.parse(other).distribution(schedule)
    assert p_value(t[shifted[t] > 0], shifted) < 1e-6


def test_documented_mean_timesteps():
    for preset, mean in (("addp_depth", 709), ("addp_ris", 903)):
        distribution = TimestepPolicy.parse(preset).distribution(SD)
        assert abs(distribution @ np.arange(1000) - mean) < 1
        shares = np.repeat(PRESETS[preset], 100) / (100 * sum(PRESETS[preset]))
        np.testing.assert_allclose(distribution, shares)


def test_documented_shares_of_high_timesteps():
    """docs/tasks.md: what the two readings of contribution make of Marigold's last hundred."""
    for spec, percent in (("ddim:10", 1), ("ddim_noise:10", 48), ("addp_depth", 31)):
        distribution = TimestepPolicy.parse(spec).distribution(ZERO_SNR)
        assert round(100 * distribution[900:].sum()) == percent


def test_bins_of_uneven_width():
    policy = TimestepPolicy.weighted((1.0, 1.0, 1.0))
    distribution = policy.distribution(linear(10))
    np.testing.assert_allclose(
        [distribution[:3].sum(), distribution[3:6].sum(), distribution[6:].sum()], 1 / 3
    )


@pytest.mark.parametrize("held", contribution.HELD)
@pytest.mark.parametrize(
    ("solver", "factors"),
    [("ddim", contribution.ddim_factors), ("ddpm", contribution.ddpm_factors)],
)
@pytest.mark.parametrize("schedule", [SD, ZERO_SNR], ids=["sd", "zero_snr"])
def test_steps_have_the_squares_of_their_contributions(solver, factors, schedule, held):
    spec = f"{solver}_noise:8" if held == "noise" else f"{solver}:8"
    distribution = TimestepPolicy.parse(spec).distribution(schedule)
    c = factors(schedule, 8, held=held)
    # Leading spacing begins at 875 and ends at 0, which one timestep is left for.
    leading = [
        range(751, 1000),
        *(range(k * 125 + 1, k * 125 + 126) for k in range(5, -1, -1)),
        [0],
    ]
    trailing = [range(k * 125, k * 125 + 125) for k in range(7, -1, -1)]
    for share, covered in zip(
        c**2 / np.sum(c**2), leading if schedule is SD else trailing, strict=True
    ):
        np.testing.assert_allclose(distribution[np.array(covered)], share / len(covered))


def test_fixed():
    assert (draw("fixed:1", 0, count=5) == 1).all()
    assert (draw("fixed:1", 0, count=5, strata=5) == 1).all()
    assert TimestepPolicy.parse("fixed:7") == TimestepPolicy.constant(7)
    assert TimestepPolicy.parse("fixed:7").fixed == 7
    assert TimestepPolicy.parse("ddim:7").fixed is None
    np.testing.assert_array_equal(TimestepPolicy.constant(2).distribution(linear(4)), [0, 0, 1, 0])


def test_rare_timesteps_are_drawn_at_both_ends():
    t = draw("weighted:2e-6,1,2e-6", 3, linear(3), count=3_000_000)
    counts = np.bincount(t, minlength=3)
    assert 0 < counts[0] < 20  # six are expected
    assert 0 < counts[2] < 20


@pytest.mark.parametrize(
    ("spec", "strata"), [("uniform", 0), ("addp_depth", 0), ("ddim:10", 48), ("fixed:3", 48)]
)
def test_rows_depend_on_key_and_index_only(rng, spec, strata):
    key = jax.random.key(int(rng.integers(2**31)))
    index = jnp.asarray(rng.permutation(1000)[:64], jnp.int32)
    jitted = compiled(spec, SD, strata, False)
    together = jitted(key, index)
    np.testing.assert_array_equal(together[::-1], jitted(key, index[::-1]))
    np.testing.assert_array_equal(together[:16], jitted(key, index[:16]))
    if spec != "fixed:3":
        assert not np.array_equal(together, jitted(jax.random.fold_in(key, 1), index))
        assert not np.array_equal(together, jitted(key, index + 1))


# ---- strata --------------------------------------------------------------------------------------


def strata_of(t, distribution, n):
    """The first and the last stratum that each timestep has a part in."""
    upper = np.cumsum(distribution)
    lower = np.append(0, upper[:-1])
    return (
        np.floor(lower[t] * n + 1e-6).astype(int),
        np.ceil(upper[t] * n - 1e-6).astype(int) - 1,
    )


@pytest.mark.parametrize(("spec", "n"), [("uniform", 2), ("ddim:10", 16), ("logit_normal", 33)])
def test_every_batch_has_one_draw_in_each_stratum(spec, n):
    for batch in (0, 1, 70):
        index = batch * n + np.arange(n)
        t = np.sort(draw_steps(spec, n + batch, index, count=50, strata=n))
        first, last = strata_of(t, TimestepPolicy.parse(spec).distribution(SD), n)
        assert (first <= np.arange(n)).all()
        assert (last >= np.arange(n)).all()


def test_strata_come_in_another_order_in_each_step():
    first, second = (draw("uniform", seed, count=20, strata=20) // 50 for seed in (0, 1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert not np.array_equal(first, second)
    # Nor are the places inside the strata those of each other.
    t = draw("uniform", 0, linear(1_000_000), count=200, strata=200)
    assert stats.kstest(t % 5000 / 5000, "uniform").pvalue > 1e-3


def test_examples_of_a_batch_are_not_alike():
    """Two examples fall into different strata, and are otherwise independent."""
    t = draw_steps("uniform", 2, [4, 9], strata=4) // 250
    counts = np.zeros((4, 4))
    np.add.at(counts, (t[:, 0], t[:, 1]), 1)
    # 9 is the example after 4 in the order of strata, that of 5.
    assert not np.diag(counts).any()
    pairs = counts[~np.eye(4, dtype=bool)]
    assert stats.chisquare(pairs).pvalue > 1e-3


def test_means_over_stratified_batches_vary_less():
    """By the variance between strata: for a smooth loss that is nearly all of it."""
    n, batches = 16, 400

    for spec in ("uniform", "ddim:10"):
        distribution = TimestepPolicy.parse(spec).distribution(SD)
        loss = (np.arange(1000) / 1000) ** 2
        mean = distribution @ loss
        spread = np.sqrt(distribution @ (loss - mean) ** 2 / n)
        alone, together = (
            loss[draw_steps(spec, 7, np.arange(n), count=batches, strata=strata)].mean(1)
            for strata in (0, n)
        )
        assert alone.std() == pytest.approx(spread, rel=0.2)
        assert together.std() < spread / 5
        for x in (alone, together):
            assert abs(x.mean() - mean) < 4.5 * x.std() / np.sqrt(batches)


@pytest.mark.parametrize("strata", [0, 16])
def test_devices_and_micro_batches_do_not_matter(strata):
    """Whatever part of the stream is where: the timesteps are those of one device."""
    index = {"index": np.arange(48, 64, dtype=np.int32)}
    key = jax.random.key(3)
    expected = draw("ddim:10", 3, count=16, strata=strata, start=48)
    run = compiled("ddim:10", SD, strata, False)

    @jax.jit
    def micro_batches(key, parts):
        return jax.lax.scan(lambda carry, i: (carry, run(key, i)), 0, parts)[1]

    for sizes, accumulate in (({"data": 4}, 4), ({"data": 2, "fsdp": 4}, 2)):
        devices = jax.devices()[: int(np.prod(list(sizes.values())))]
        mesh = sharding.make_mesh(**sizes, devices=devices)
        whole = sharding.put_batch(index, mesh)["index"]
        assert len(whole.sharding.device_set) == len(devices)
        np.testing.assert_array_equal(run(key, whole), expected)
        parts = sharding.put_batch(index, mesh, accumulate)["index"]
        assert parts.shape[0] == accumulate
        np.testing.assert_array_equal(np.asarray(micro_batches(key, parts)).ravel(), expected)


# ---- what losses are worth -----------------------------------------------------------------------


@pytest.mark.parametrize("spec", [s for s in SPECS if s != "weighted:0,2,0,1,1"])
def test_expected_losses(rng, spec):
    """Exactly, as sums over the timesteps."""
    policy = TimestepPolicy.parse(spec)
    p = policy.distribution(ZERO_SNR)
    losses = rng.gamma(1.0, size=1000)

    def expected(use):
        return drawn_policy(policy, use).distribution(ZERO_SNR) @ (
            loss_weights(policy, ZERO_SNR, use) * losses
        )

    assert expected("sample") == pytest.approx(p @ losses)
    assert expected("loss") == pytest.approx(p @ losses)
    if p.min() > 1e-7:
        assert expected("importance") == pytest.approx(losses.mean())
    else:
        with pytest.raises(UserError, match="hardly ever"):
            expected("importance")
    np.testing.assert_array_equal(loss_weights(policy, ZERO_SNR, "sample"), 1)


def test_importance_is_possible_where_it_is_useful():
    for spec in ("addp_depth", "addp_ris", "ddim:10", "p2"):
        for schedule in (SD, ZERO_SNR):
            weights = loss_weights(TimestepPolicy.parse(spec), schedule, "importance")
            assert 0 < weights.min() < 1 < weights.max() < 1e4
    # With zero terminal SNR the first DDPM step leaves nothing but fresh noise of its output.
    for spec in ("weighted:1,0", "fixed:3", "logit_normal", "min_snr:5", "ddpm:50"):
        with pytest.raises(UserError, match="no importance weight makes up for"):
            loss_weights(TimestepPolicy.parse(spec), ZERO_SNR, "importance")
    with pytest.raises(UserError, match="'sometimes' is unknown; choose sample, loss, importance"):
        loss_weights(TimestepPolicy(), SD, "sometimes")


def test_importance_weights_are_right_on_average():
    """What is drawn by a policy and weighed has the mean of all timesteps, at each timestep."""
    policy = TimestepPolicy.parse("ddim:4")
    t = draw(policy, 5, count=400_000)
    weights = loss_weights(policy, SD, "importance")
    for bin in range(10):
        share = weights[t] * (t // 100 == bin)
        assert abs(share.mean() - 0.1) < 4.5 * share.std() / np.sqrt(len(t))


# ---- how policies are written --------------------------------------------------------------------


def test_specs_and_defaults():
    for spec in SPECS:
        policy = TimestepPolicy.parse(spec)
        assert TimestepPolicy.parse(str(policy)) == policy
        assert hash(policy) == hash(TimestepPolicy.parse(spec))
    assert TimestepPolicy() == TimestepPolicy.parse("uniform")
    for short, long in (
        ("p2", "p2:1,1"),
        ("min_snr", "min_snr:5"),
        ("logit_normal", "logit_normal:0,1"),
        ("addp_depth", "weighted:1,1,3,7,13,14,8,4,22,33"),
    ):
        assert TimestepPolicy.parse(short) == TimestepPolicy.parse(long)
    for kind, (schedule, s) in itertools.product(
        ("p2", "min_snr", "logit_normal"), (("sd", SD), ("zero_snr", ZERO_SNR))
    ):
        numbers = {"p2": (0.7, 1.5), "min_snr": (3.0,), "logit_normal": (0.3, 0.8)}[kind]
        weights = getattr(contribution, kind)(s, *numbers)
        ours = TimestepPolicy(kind, numbers).distribution(s)
        np.testing.assert_allclose(ours, weights / weights.sum(), err_msg=schedule)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("", "Unknown timestep policy ''; choose uniform, fixed:T, .*addp_ris or file:PATH"),
        ("sometimes", "Unknown timestep policy 'sometimes'"),
        ("addp_depth:3", "Unknown"),
        ("uniform:3", "not of the form uniform, without numbers"),
        ("fixed", "not of the form fixed:T"),
        ("fixed:x", "unreadable number; write it like fixed:T"),
        ("fixed:1.5", "unreadable"),
        ("fixed:-1", "not of the form"),
        ("fixed:1,2", "not of the form"),
        ("fixed:1000", "1000 is not below num_train_timesteps=1000"),
        (f"fixed:1{'0' * 400}", "not of the form"),
        ("weighted:", "weights"),
        ("weighted:a", "unreadable"),
        ("weighted:1,,2", "unreadable"),
        ("weighted:0,0", "weights of 0 or more that are not all 0"),
        ("weighted:1,-1", "weights"),
        ("weighted:nan,1", "weights"),
        ("weighted:inf", "weights"),
        ("ddim", "not of the form ddim:N"),
        ("ddim:0", "not of the form ddim:N"),
        ("ddim:1001", "inference steps is 1001"),
        ("ddpm:2.5", "unreadable"),
        ("p2:1", "not of the form p2:K,GAMMA"),
        ("p2:0,1", "K above 0"),
        ("p2:1,-1", "GAMMA of 0 or more"),
        ("min_snr:0", "above 0"),
        ("min_snr:1,2", "not of the form"),
        ("logit_normal:0,0", "STD above 0"),
        ("logit_normal:nan,1", "not of the form"),
        ("weighted:" + ",".join(["1"] * 1001), "1001 timestep bins do not fit"),
        ("weighted:" + ",".join(["0"] * 1000), "not all 0"),
        ("p2:1,1e9", "no timestep of this schedule a weight"),
    ],
)
def test_bad_policies(spec, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        sample_timesteps(spec, jax.random.key(0), jnp.arange(2), SD)
    assert str(error.value).count(". ") == 0
    assert len(str(error.value)) < 250


def test_policies_that_do_not_fit_the_schedule():
    def distribution(spec, schedule):
        return TimestepPolicy.parse(spec).distribution(schedule)

    with pytest.raises(UserError, match="10 timestep bins do not fit into 5 timesteps"):
        distribution("addp_depth", linear(5))
    with pytest.raises(UserError, match="epsilon"):
        distribution("ddim:5", NoiseSchedule(rescale_betas_zero_snr=True))
    with pytest.raises(UserError, match="the last one alone makes the result"):
        distribution("ddim:5", GENPERCEPT)
    with pytest.raises(UserError, match="no timestep of this schedule a weight"):
        distribution("min_snr", GENPERCEPT)
    np.testing.assert_allclose(distribution("ddim:1", GENPERCEPT), 1 / 1000)


def test_every_kind_is_tested():
    assert {*KINDS} == {TimestepPolicy.parse(spec).kind for spec in SPECS} | {"fixed"}
    assert USES == ("sample", "loss", "importance")


# ---- tables in files -----------------------------------------------------------------------------


def test_a_table_is_read_once(tmp_path):
    path = tmp_path / "table: one, two.json"
    content = {"weights": [1, 0.125, 3], "checkpoint": "runs/x", "seeds": [0, 1]}
    path.write_text(json.dumps(content))
    assert read_table(path) == (1, 0.125, 3)
    policy = TimestepPolicy.parse(f"file:{path}")
    assert resolve(f"file:{path}") == "weighted:1,0.125,3"
    path.unlink()
    assert policy == TimestepPolicy.parse("weighted:1,0.125,3")
    assert resolve("addp_depth") == "addp_depth"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        ("[1, 2]", "needs the key 'weights'"),
        ('{"weight": [1]}', "needs the key 'weights'"),
        ('{"weights": []}', "numbers"),
        ('{"weights": 3}', "numbers"),
        ('{"weights": [1, -1]}', "0 or more"),
        ('{"weights": [1, NaN]}', "numbers"),
        ('{"weights": [1, Infinity]}', "numbers"),
        ('{"weights": [1, "2"]}', "numbers"),
        ('{"weights": [1, true]}', "numbers"),
        ('{"weights": [0, 0]}', "not all 0"),
        (None, r"cannot be read \(no such file"),
    ],
)
def test_bad_tables(tmp_path, content, complaint):
    path = tmp_path / "table.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=complaint) as error:
        TimestepPolicy.parse(f"file:{path}")
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path)
