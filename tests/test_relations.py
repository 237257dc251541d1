"""Relations between width and quality: what they say, how they are fitted, and how far their intervals reach."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest

from slicecli.errors import PluginError, RequestError
from slicecli.estimation.curves import ONE_POINT_RELATION, fit_curve, leave_one_out, restore_curve
from slicecli.estimation.exponents import loss_at_reference
from slicecli.estimation.intervals import (
    DEFAULT_RELATION,
    predict_fitted,
    predict_new,
    refit_shift_of,
    shifted,
    spread_of,
)
from slicecli.estimation.measurements import Point, Series, published_figure, published_rows, published_series
from slicecli.estimation.relations import BUILT_IN, Dense, Prior, Relation, relation_named
from slicecli.estimation.results import read_curves
from slicecli.estimation.spread import CONFIDENCE, Deviation, learn_spread, little_text_excess
from slicecli.estimation.validation import check_relations, summary
from slicecli.family import hookspecs
from slicecli.record import schema

SPARSITIES = (0.06, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5)
PERPLEXITY = Dense(
    math.log(6.24), spectrum=lambda sparsity: 0.8 * sparsity**1.6, probe=lambda sparsity: 0.7 * sparsity**1.5
)
ACCURACY = Dense(0.79, 0.5, lambda sparsity: 2.0 * sparsity**1.5)
TRUE = {"c": 2.1, "b": 1.12, "p": 1.7, "r": 0.9}


def dense_for(relation):
    return PERPLEXITY if relation.quantity == "perplexity" else ACCURACY


def identity(relation):
    return f"{relation.quantity}-{relation.name}"


def exact_points(relation, sparsities=SPARSITIES):
    parameters = [TRUE[name] for name in relation.parameters]
    return [(one, relation.predict(one, dense_for(relation), parameters)) for one in sparsities]


def series_from(relation, sparsities=SPARSITIES, noise=0.0, seed=0, family="llama", size=4096):
    chosen = random.Random(seed)
    points = tuple(
        Point(one, value + noise * chosen.gauss(0, 1), None, round(size * (1 - one)))
        for one, value in exact_points(relation, sparsities)
    )
    kind = relation.quantity
    return Series("me/model", family, "slicegpt", "wikitext2", kind, "here", dense_for(relation), points)


@pytest.mark.parametrize("relation", BUILT_IN, ids=identity)
def test_a_fit_finds_the_parameters_that_made_the_points(relation):
    found = relation.fit(exact_points(relation), dense_for(relation), None)
    if relation.has_prior:  # it weighs the usual exponent against the points
        found = relation.fit(exact_points(relation), dense_for(relation), Prior(1.0, 100.0))
    assert found == pytest.approx([TRUE[name] for name in relation.parameters], rel=1e-4)


def test_a_fit_is_found_however_much_is_lost():
    relation = relation_named("decay", "accuracy")
    points = [(sparsity, relation.predict(sparsity, ACCURACY, (157.0,))) for sparsity in (0.05, 0.1, 0.5)]
    assert relation.fit(points, ACCURACY, None) == pytest.approx((157.0,), rel=1e-6)


@pytest.mark.parametrize("relation", BUILT_IN, ids=identity)
def test_nothing_removed_is_the_dense_model_and_more_removed_is_worse(relation):
    parameters = [TRUE[name] for name in relation.parameters]
    dense = dense_for(relation)
    values = [relation.predict(step / 100, dense, parameters) for step in range(91)]
    assert values[0] == pytest.approx(dense.value, abs=1e-12)
    steps = [later - earlier for earlier, later in pairwise(values)]
    assert all(step > 0 for step in steps) if relation.quantity == "perplexity" else all(step < 0 for step in steps)


def test_the_papers_relation_is_what_the_paper_says():
    paper = relation_named("paper", "perplexity")
    for sparsity in SPARSITIES:
        assert PERPLEXITY.value / paper.predict(sparsity, PERPLEXITY, ()) == pytest.approx(1 - sparsity)
    accuracy = relation_named("paper", "accuracy")
    for sparsity in SPARSITIES:
        predicted = accuracy.predict(sparsity, ACCURACY, ())
        assert math.log(predicted / 0.5) == pytest.approx((1 - sparsity) * math.log(0.79 / 0.5))
    assert accuracy.predict(1.0, ACCURACY, ()) == pytest.approx(0.5)
    assert "chance" in accuracy.why_not(Dense(0.7, None))
    assert "chance" in accuracy.why_not(Dense(0.7, 0.0))


def test_one_point_fixes_the_scale_and_the_prior_the_exponent():
    relation = relation_named("free-power", "perplexity")
    scale, exponent = relation.fit([(0.2, PERPLEXITY.value + 0.5)], PERPLEXITY, Prior(1.9, 0.2))
    assert exponent == pytest.approx(1.9)
    assert scale * 0.2**1.9 == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["free-power", "free-odds"])
def test_what_loses_more_grows_more_slowly(name):
    relation = relation_named(name, "perplexity")
    prior = spread_of(name, "perplexity", "slicegpt").prior
    losses = (0.01, 0.1, 0.5, 2.0, 8.0)
    exponents = [relation.fit([(0.2, PERPLEXITY.value + loss)], PERPLEXITY, prior)[1] for loss in losses]
    assert exponents == sorted(exponents, reverse=True)
    assert exponents[-1] > 0


@pytest.mark.parametrize("sparsity", [0.01, 0.5, 0.75, 0.8, 0.9, 0.99])
def test_one_slice_of_any_width_goes_through_its_point(sparsity):
    relation = relation_named("free-odds", "perplexity")
    prior = spread_of("free-odds", "perplexity", "slicegpt").prior
    parameters = relation.fit([(sparsity, PERPLEXITY.value + 2.0)], PERPLEXITY, prior)
    assert relation.predict(sparsity, PERPLEXITY, parameters) == pytest.approx(PERPLEXITY.value + 2.0)


# the published measurements


def test_every_published_row_has_a_source_and_a_use():
    rows = published_rows()
    assert len(rows) > 400
    for row in rows:
        assert row.source
        assert row.use
        assert "/" in row.model
        assert (row.sparsity == 0) == (row.use in ("dense", "reference")) == (row.method == "dense")
        assert 0 <= row.sparsity < 1
        assert row.value > 1 if row.metric == "perplexity" else 0 < row.value < 1
    found = published_figure("meta-llama/llama-2-7B-HF", "perplexity", "wikitext2")
    assert (found.value, found.source) == (5.47, "published: arXiv:2401.15024 T1")
    assert published_figure("nobody/nothing", "perplexity", "wikitext2") is None


all_checks = functools.cache(check_relations)


def lines_for(quantity, knows, largest=1.0):
    lines = summary([check for check in all_checks(quantity, largest) if check.knows == knows])
    return {line["relation"]: line for line in lines if line["family"] == "all"}


def rows_for(name, quantity, knows):
    return next(check.rows for check in all_checks(quantity) if (check.relation.name, check.knows) == (name, knows))


@pytest.mark.parametrize("quantity", ["perplexity", "accuracy"])
def test_the_relation_for_one_slice_predicts_the_others_best(quantity):
    """For s <= 0.31, the mean over all points."""
    errors = {
        check.relation.name: sum(row.error for row in check.rows) / len(check.rows)
        for check in all_checks(quantity, 0.31)
        if check.knows == "one slice"
    }
    assert min(errors, key=errors.get) == ONE_POINT_RELATION[quantity]


def test_one_slice_predicts_the_others_within_a_percent_and_a_half():
    rows = rows_for(ONE_POINT_RELATION["perplexity"], "perplexity", "one slice")
    near = [row.error for row in rows if row.sparsity <= 0.31]
    assert sum(near) / len(near) <= 0.015


def test_one_slice_predicts_half_of_the_hidden_size():
    """Of large models; SmolLM2 loses far less there than from its slices up to a quarter, see docs/relations.md."""
    rows = rows_for(ONE_POINT_RELATION["perplexity"], "perplexity", "one slice")
    far = [row for row in rows if row.sparsity > 0.31 and row.series.parameters > 1e9]
    assert sum(row.error for row in far) / len(far) <= 0.12
    assert all(row.is_covered for row in far)


def test_accuracies_are_predicted_within_four_points():
    rows = rows_for(DEFAULT_RELATION["accuracy"], "accuracy", "other models")
    assert sum(row.error for row in rows) / len(rows) <= 0.04


@pytest.mark.parametrize("quantity", ["perplexity", "accuracy"])
@pytest.mark.parametrize("knows", ["other models", "one slice"])
def test_intervals_hold_nine_tenths_of_the_points_of_models_left_out(quantity, knows):
    for name, line in lines_for(quantity, knows).items():
        assert line["coverage"] >= 0.9, name


@pytest.mark.parametrize("quantity", ["perplexity", "accuracy"])
def test_the_default_does_best_on_models_that_are_left_out(quantity):
    errors = {name: line["mean_error"] for name, line in lines_for(quantity, "other models").items()}
    assert min(errors, key=errors.get) == DEFAULT_RELATION[quantity]


def test_one_slice_predicts_the_others_on_other_text():
    usual = lines_for("perplexity", "other text, one slice", 0.31)[ONE_POINT_RELATION["perplexity"]]
    assert usual["mean_error"] <= 0.12


def test_intervals_are_not_wider_than_they_need_to_be():
    usual = lines_for("perplexity", "other models", 0.31)[DEFAULT_RELATION["perplexity"]]
    assert usual["median_width"] <= 1.35
    assert usual["coverage"] < 1
    assert lines_for("accuracy", "other models")[DEFAULT_RELATION["accuracy"]]["median_width"] <= 0.25
    assert lines_for("accuracy", "one slice")[ONE_POINT_RELATION["accuracy"]]["median_width"] <= 0.12


def test_a_model_that_is_left_out_has_no_say():
    relation = relation_named("odds", "perplexity")
    series = published_series("perplexity")
    left_out = "meta-llama/Llama-2-7b-hf"
    others = [one for one in series if one.model != left_out]
    changed = [
        dataclasses.replace(
            one, points=tuple(dataclasses.replace(point, value=point.value + 1) for point in one.points)
        )
        if one.model == left_out
        else one
        for one in series
    ]
    assert learn_spread(relation, others) == learn_spread(relation, [one for one in changed if one.model != left_out])
    assert learn_spread(relation, changed) != learn_spread(relation, series)


def test_slices_with_little_calibration_text_lose_by_one_law():
    relation = relation_named("free-odds", "perplexity")
    as_measured, with_endless_text = defaultdict(list), defaultdict(list)
    for one in published_series("perplexity"):
        fitted = relation.fit([(point.sparsity, point.value) for point in one.points], one.dense, None)
        loss = loss_at_reference(relation, one.dense, fitted)
        as_measured[one.model].append(loss)
        with_endless_text[one.model].append(loss - little_text_excess(one.tokens_per_coordinate))
    for model, losses in as_measured.items():
        assert np.std(with_endless_text[model]) < 0.06
        assert np.std(with_endless_text[model]) <= np.std(losses)


# intervals


def new(name, family="llama", sparsity=0.25, size=8e9, shifts=()):
    spread = spread_of(name, "perplexity", "slicegpt")
    return predict_new(spread, PERPLEXITY, family, math.log(size), "slicegpt", sparsity, shifts)


def fitted(name, sparsity, *points, family="llama"):
    spread = spread_of(name, "perplexity", "slicegpt")
    measured = [Point(one, value) for one, value in points]
    parameters = spread.relation.fit(points, PERPLEXITY, spread.prior)
    return predict_fitted(spread, parameters, PERPLEXITY, family, measured, sparsity)


def width(prediction):
    return prediction.high - prediction.low


@pytest.mark.parametrize("name", ["paper", "power", "odds", "exponent", "free-power", "free-odds"])
def test_an_interval_holds_its_value_and_less_is_known_of_new_families(name):
    known, unknown = new(name), new(name, "unheard-of")
    for prediction in (known, unknown):
        assert PERPLEXITY.value - 0.01 <= prediction.low <= prediction.value <= prediction.high
    assert width(known) < width(unknown)


def test_models_of_a_size_that_nobody_measured_are_known_less():
    widths = [width(new("odds", size=size)) for size in (8e9, 4e11, 4e12)]
    assert widths[0] < widths[1]
    # and beyond a decade of it nothing more is said
    assert width(new("odds", size=1e13)) == pytest.approx(width(new("odds", size=1e15)))
    small = new("odds", "opt", size=1.3e8), new("odds", "opt", size=6e10)
    # of OPT the larger ones lose less
    assert small[0].value > small[1].value


def test_the_refit_is_predicted_by_its_share_of_the_published_loss():
    published = new("free-odds")
    losses = []
    for is_centred in (False, True):
        shift = refit_shift_of(is_centred)
        refit = new("free-odds", shifts=[shift])
        losses.append((refit.value - PERPLEXITY.value) / (published.value - PERPLEXITY.value))
        assert losses[-1] == pytest.approx(math.exp(shift.mean), rel=1e-3)
        # of slices whose losses are published, likewise
        moved = shifted(published, PERPLEXITY, shift)
        assert moved.value == pytest.approx(refit.value, rel=1e-3)
        assert moved.low < moved.value < moved.high
        # the share is not the same for all models
        factors = [(one.high - PERPLEXITY.value) / (one.value - PERPLEXITY.value) for one in (moved, published)]
        assert factors[0] > factors[1]
    assert losses[0] < 0.8 < losses[1]


def test_slices_lose_more_on_other_text_and_by_another_exponent():
    c4 = spread_of("free-odds", "perplexity", "slicegpt", True)
    size = math.log(8e9)
    other = [predict_new(c4, PERPLEXITY, "llama", size, "slicegpt", sparsity) for sparsity in (0.15, 0.3)]
    own = [new("free-odds", sparsity=sparsity) for sparsity in (0.15, 0.3)]
    lost = [[one.value - PERPLEXITY.value for one in some] for some in (other, own)]
    assert lost[0][0] > 2 * lost[1][0]
    assert lost[0][1] / lost[0][0] < lost[1][1] / lost[1][0]
    # and one measured slice is extended by the exponent of such texts
    points = (Point(0.2, PERPLEXITY.value + 1.0),)
    curves = [
        fit_curve(Series("me/model", "llama", "slicegpt", "wikitext2", "perplexity", text, PERPLEXITY, points))
        for text in ("c4", "wikitext2")
    ]
    assert curves[0].predict(0.4).value < curves[1].predict(0.4).value


@pytest.mark.parametrize("name", ["power", "odds", "exponent", "free-power", "free-odds"])
def test_intervals_widen_with_what_is_removed(name):
    widths = [width(new(name, sparsity=sparsity)) for sparsity in SPARSITIES]
    assert widths == sorted(widths)


def test_intervals_close_where_nothing_is_removed():
    prediction = new("free-odds", sparsity=1e-4)
    assert prediction.low == PERPLEXITY.value
    assert prediction.high == pytest.approx(PERPLEXITY.value, abs=0.01)


@pytest.mark.parametrize("name", ["power", "odds", "exponent", "free-power", "free-odds"])
def test_measured_slices_narrow_the_interval_and_distance_widens_it(name):
    points = exact_points(relation_named(name, "perplexity"))
    one = fitted(name, 0.25, points[2])
    two = fitted(name, 0.25, points[2], points[4])
    all_of_them = fitted(name, 0.25, *points)
    typical = new(name)
    # as factors on what is lost, because the slices that were measured lost more than usual
    assert width(typical) / (typical.value - PERPLEXITY.value) > width(one) / (one.value - PERPLEXITY.value)
    assert width(one) > width(two) > width(all_of_them)
    away = [width(fitted(name, sparsity, points[2])) for sparsity in (0.21, 0.3, 0.4, 0.5)]
    assert away == sorted(away)

    # on the scale of factors on what is lost, the other way too
    def factor(sparsity):
        prediction = fitted(name, sparsity, points[2])
        return (prediction.high - PERPLEXITY.value - 0.005) / (prediction.value - PERPLEXITY.value)

    assert factor(0.05) > factor(0.1) > factor(0.19)


def test_outside_of_what_is_known_is_flagged():
    points = exact_points(relation_named("power", "perplexity"))[2:5]
    assert [fitted("power", s, *points).is_outside for s in (0.1, 0.2, 0.25, 0.3, 0.31)] == [
        True, False, False, False, True,
    ]  # fmt: skip
    assert [new("odds", sparsity=s).is_outside for s in (0.05, 0.25, 0.5, 0.55)] == [True, False, False, True]


def test_slices_that_lost_nothing_leave_an_interval():
    prediction = fitted("odds", 0.3, (0.1, PERPLEXITY.value - 0.001))
    assert prediction.low < prediction.high
    assert math.isfinite(prediction.high)


@pytest.mark.parametrize("degrees", [2, 2.5, 3, 6, 30, 1000])
def test_quantiles_are_those_of_students_t(degrees):
    from scipy.special import stdtrit

    expected = stdtrit(degrees, (1 + CONFIDENCE) / 2)
    assert Deviation(0.0, 3.0, degrees).half_width == pytest.approx(3 * expected, rel=6e-3)


# curves


@pytest.mark.parametrize("relation", [one for one in BUILT_IN if one.parameters], ids=identity)
def test_leave_one_out_prefers_the_relation_that_made_the_points(relation):
    curve = fit_curve(series_from(relation, noise=1e-4))
    errors = {one.relation: one.loo_error for one in curve.alternatives}
    # where there is a prior, it pulls
    assert errors[relation.name] < (0.05 if relation.has_prior else 2e-3)
    best = min(errors, key=errors.get)
    assert curve.relation == best
    # a freer relation may come as near
    assert best == relation.name or relation.has_prior or errors[relation.name] < 2 * errors[best] + 5e-4
    assert "smallest leave-one-out error" in curve.reason


def test_leave_one_out_is_what_its_name_says():
    relation = relation_named("odds", "perplexity")
    series = series_from(relation, noise=0.05, seed=3)
    by_hand = []
    for point in series.points:
        others = [(one.sparsity, one.value) for one in series.points if one is not point]
        scale = sum(s / (1 - s) * (v - PERPLEXITY.value) for s, v in others) / sum(
            (s / (1 - s)) ** 2 for s, _ in others
        )
        by_hand.append(abs(PERPLEXITY.value + scale * point.sparsity / (1 - point.sparsity) - point.value))
    assert leave_one_out(relation, series) == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-9)


def test_few_points_take_what_does_best_with_few():
    curves = [fit_curve(series_from(relation_named("power", "perplexity"), SPARSITIES[:count])) for count in (2, 3, 4)]
    assert [curve.relation for curve in curves[:2]] == [ONE_POINT_RELATION["perplexity"]] * 2
    assert "3 points" in curves[1].reason
    assert "smallest leave-one-out error" in curves[2].reason


def test_losses_of_the_refit_grow_more_slowly_than_those_of_the_published_method():
    dense = Dense(math.log(6.24))
    exponents = [
        spread_of("free-odds", "perplexity", method).base(dense, "llama", math.log(8e9))[1]
        for method in ("refit", "slicegpt")
    ]
    assert exponents[0] < exponents[1]


def test_one_point_takes_what_does_best_with_one_and_says_so():
    curve = fit_curve(series_from(relation_named("odds", "perplexity"), (0.2,)))
    assert curve.relation == ONE_POINT_RELATION["perplexity"]
    assert "one point" in curve.reason
    assert math.isnan(curve.loo_error)
    assert curve.covariance is None
    assert curve.to_json()["loo_error"] is None
    json.dumps(curve.to_json(), allow_nan=False)


def test_the_covariance_is_that_of_repeated_measurements():
    relation = relation_named("odds", "perplexity")
    curves = [fit_curve(series_from(relation, noise=0.02, seed=seed), "odds") for seed in range(300)]
    scales = [curve.parameters[0] for curve in curves]
    mean = sum(scales) / len(scales)
    variance = sum((scale - mean) ** 2 for scale in scales) / len(scales)
    told = sum(curve.covariance[0][0] for curve in curves) / len(curves)
    assert told == pytest.approx(variance, rel=0.25)


@pytest.mark.parametrize("relation", BUILT_IN, ids=identity)
def test_a_curve_reads_back_as_it_was(relation):
    series = series_from(relation, noise=1e-3)
    curve = fit_curve(series, relation.name, {"limit": 7})
    written = json.loads(json.dumps(curve.to_json(), allow_nan=False))
    again = restore_curve(schema.Curve.model_validate(written), series.dense)
    assert again.reason == curve.reason
    for sparsity in (0.1, 0.33, 0.55):
        one, other = curve.predict(sparsity), again.predict(sparsity)
        assert (one.value, one.low, one.high) == pytest.approx((other.value, other.low, other.high), rel=1e-9)
    for one, other in zip(again.to_json()["points"], written["points"], strict=True):
        assert one == pytest.approx(other)
    assert again.hidden_size == 4096


@pytest.mark.parametrize(
    "damage",
    [
        lambda fields: fields.pop("points"),
        lambda fields: fields.update(points=[]),
        lambda fields: fields.update(dense=0.5),
        lambda fields: fields.update(dense="many"),
        lambda fields: fields.update(relation="hearsay"),
        lambda fields: fields.update(quantity="beauty"),
        lambda fields: fields["points"][0].update(sparsity=1.5),
        lambda fields: fields["points"][0].update(value=float("nan")),
        lambda fields: fields["points"].append(7),
    ],
)
def test_what_is_not_a_curve_is_refused(damage):
    fields = fit_curve(series_from(relation_named("odds", "perplexity"))).to_json()
    damage(fields)
    with pytest.raises(RequestError):
        read_curves({"curves": [fields]})


def test_a_relation_that_cannot_be_fitted_is_refused_with_the_reason():
    with pytest.raises(RequestError, match="Available: paper, power"):
        fit_curve(series_from(relation_named("odds", "perplexity")), "hearsay")
    accuracy = series_from(relation_named("decay", "accuracy"))
    hopeless = dataclasses.replace(accuracy, dense=Dense(0.7, None))
    with pytest.raises(RequestError, match="chance level"):
        fit_curve(hopeless, "paper")
    with pytest.raises(RequestError, match="no measured slice"):
        fit_curve(dataclasses.replace(accuracy, points=()))


# relations of plugins


@pytest.fixture
def plugin(monkeypatch):
    """Let one module take part as a plugin."""
    from slicecli.family import plugins as module

    def install(relations):
        class Holder:
            @hookspecs.hookimpl
            def slicecli_register_relations(self, register):
                for relation in relations:
                    register(relation)

        loaded = module.load_plugins([])
        loaded.manager.register(Holder())
        monkeypatch.setattr("slicecli.estimation.relations.plugins", lambda: loaded)
        spread_of.cache_clear()

    yield install
    spread_of.cache_clear()


def test_a_plugin_adds_a_relation_that_is_fitted_and_chosen_like_any_other(plugin):
    square = Relation(
        "square", "perplexity", "ln PPL = ln PPL0 + c s^2", "here", ("c",),
        lambda sparsity, dense, parameters: dense.value + parameters[0] * sparsity**2,
        lambda points, dense, prior: (
            sum(s**2 * (v - dense.value) for s, v in points) / sum(s**4 for s, _ in points),
        ),
    )  # fmt: skip
    plugin([square])
    made = tuple(Point(one, PERPLEXITY.value + 3 * one**2) for one in SPARSITIES)
    series = Series("me/model", "llama", "slicegpt", "text", "perplexity", "here", PERPLEXITY, made)
    curve = fit_curve(series)
    assert {one.relation for one in curve.alternatives} >= {"square", "odds"}
    assert fit_curve(series, "square").parameters == pytest.approx((3,))
    assert width(curve.predict(0.35)) > 0


def test_a_name_that_is_taken_is_refused(plugin):
    plugin([relation_named("odds", "perplexity")])
    with pytest.raises(PluginError, match="odds"):
        relation_named("power", "perplexity")
