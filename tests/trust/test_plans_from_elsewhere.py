"""Plans read from JSON are data: whatever stands there, it is a plan or a typed error."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import illava
from illava.plan import PLAN_FIELDS, Plan

LAYER = st.integers(0, 40) | st.floats(0, 1, exclude_min=True, exclude_max=True)
LAYERS = st.none() | st.lists(LAYER, unique=True, max_size=4)
SHARE = st.floats(0, 1, allow_nan=False)
OPEN = st.floats(0, 1, exclude_min=True)
SHARES = st.lists(OPEN, max_size=3).map(lambda x: sorted(x, reverse=True))
BUDGETS = st.one_of(
    st.builds(lambda x: {"vit_shares": x, "vit_layers": list(range(len(x)))} if x else {}, SHARES),
    st.fixed_dictionaries({}, optional={"reduction": st.floats(0, 1, exclude_max=True)}),
    st.fixed_dictionaries({}, optional={"vit_keep_ratio": OPEN, "llm_keep_ratio": OPEN}),
    st.fixed_dictionaries(
        {}, optional={"vit_tokens_removed": st.integers(0), "llm_tokens_removed": st.integers(0)}
    ),
)
OTHERS = st.fixed_dictionaries(
    {},
    optional=dict(
        vit_layers=LAYERS,
        llm_layers=LAYERS,
        encoder_share=st.none() | SHARE,
        recycled=OPEN,
        members=st.integers(1),
        score=st.sampled_from([None, "attention", "lse"]),
        merge=st.sampled_from(["recycle", "prune", "linear", "bipartite"]),
        vit_merge=st.sampled_from([None, "bipartite", "recycle", "prune", "linear"]),
        queries=st.sampled_from(["text", "all", "visual", "last"]),
        window_score=st.sampled_from(["window", "picture"]),
        proportional=st.none() | st.booleans(),
        distance_penalty=st.none() | st.floats(0, 2),
    ),
)
OF_RANKING = {"recycled", "members", "score", "queries", "window_score"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(sorted(PLAN_FIELDS)) | st.text(max_size=12)


@pytest.mark.claim(
    "Safety", "a plan written to JSON and read back", "works", "equal, for any plan (hypothesis)"
)
@given(budget=BUDGETS, others=OTHERS)
@settings(max_examples=200)
def test_any_plan_comes_back(budget, others):
    others |= budget  # layers, too, where they have shares
    vit_rule = others.get("vit_merge") or others.get("merge", "bipartite")
    rules = {others.get("merge", "bipartite"), vit_rule}
    if vit_rule != "bipartite":
        others.pop("proportional", None)
    if "bipartite" not in rules:
        others.pop("distance_penalty", None)
    if rules == {"bipartite"}:
        others = {name: value for name, value in others.items() if name not in OF_RANKING}
    plan = Plan(**others)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_dict(others) == plan


@pytest.mark.claim("Safety", "any other JSON as a plan", "refused", "a PlanError, for any JSON (hypothesis)")
@given(values=st.dictionaries(NAMES, JSON, max_size=4))
@settings(max_examples=400)
def test_any_dict_is_a_plan_or_refused(values):
    try:
        plan = Plan.from_json(json.dumps(values))
    except illava.PlanError:
        return
    assert set(values) <= PLAN_FIELDS
    assert Plan.from_json(plan.to_json()) == plan


@given(text=st.text() | st.binary() | JSON)
@settings(max_examples=200)
def test_anything_else_is_refused(text):
    """Never another error than illava's own, and never a plan but from a dict."""
    try:
        Plan.from_json(text)
    except illava.PlanError:
        return
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read.*Plan.to_json"),
        ("[]", r"a plan is a dict of settings, not \[\]; give for example"),
        ("null", "not None"),
        ('{"reductoin": 0.5}', "'reductoin' is not a setting of a plan; did you mean 'reduction'?"),
        ('{"__class__": "os.system"}', "'__class__' is not a setting"),
        ('{"zzz": 1}', "'zzz' is not a setting of a plan; there are distance_penalty, "),
        ('{"reduction": NaN}', "NaN in a plan's JSON is no number"),
        ('{"reduction": -Infinity}', "-Infinity in a plan's JSON is no number"),
        ('{"reduction": 1e999}', r"reduction=inf is outside \[0, 1\)"),
        ('{"reduction": 0.1, "reduction": 0.9}', "says 'reduction' twice; say it once"),
        ('{"reduction": "0.5"}', r"reduction='0.5' is outside"),
        ('{"reduction": true}', "reduction=True is outside"),
        ('{"members": 2.5}', "members=2.5 is not a whole number"),
        ('{"members": null}', "members=None says nothing; leave it out"),
        ('{"recycled": null}', "recycled=None says nothing"),
        ('{"score": "lse"}', "score='lse' is of tokens ranked and merged by attention"),
        ('{"vit_layers": "57"}', "vit_layers='57' is not a tuple of layers"),
        ('{"vit_layers": {}}', "vit_layers={} is not a tuple of layers"),
        ('{"vit_layers": [[1]]}', r"vit_layers=\(\[1\],\): \[\[1\]\] are not layer numbers"),
        ('{"score": []}', r"score=\[\] is not known"),
        ('{"queries": "all", "members": 2}', "queries='all', members=2 is of tokens ranked"),
        ('{"distance_penalty": 2.5, "merge": "bipartite"}', "distance_penalty=2.5 is outside"),
        (
            '{"distance_penalty": 0.2, "merge": "recycle"}',
            "merge='recycle' does not do so; give merge=\"bipartite\" or",
        ),
        ('{"proportional": "no"}', "proportional='no' is neither True nor False"),
        ('{"vit_layers": [1], "vit_shares": [null]}', "None is no share"),
        ('{"vit_layers": [1], "vit_shares": {}}', "is not a tuple of shares"),
        ("[" * 100_000, "cannot be read"),
    ],
    ids=range(27),
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(illava.PlanError, match=message):
        Plan.from_json(text)


@pytest.mark.parametrize("value", [b"\x02\x08", "28", {2: 8}])
def test_layers_are_no_text_and_no_dict(value):
    with pytest.raises(illava.PlanError, match="is not a tuple of layers"):
        Plan(llm_layers=value)
