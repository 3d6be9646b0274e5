"""A routed model among the tools people use with one: each leaves routing right, or says so."""

import copy
import io
import logging

import accelerate
import accelerate.hooks
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

from drllm.errors import RoutingError
from drllm.model.prompts import pad_left
from drllm.models.routed_model import RoutedModel
from drllm.models.routing.policies import FixedPolicy
from slow_way import LOGIT_TOLERANCE, ListedModel, needs_tracing, tiny_routers

pytestmark = pytest.mark.filterwarnings(  # transformers renames it; PEFT still asks by the old name
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)

PLAN = [0, 1, 2, 1, 0, 2]
MIXED = [PLAN, [1, 1, 1, 1, 1, 1], [2, 0, 0, 1, 1, 0]]
ROWS = [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14]]
PROMPTS = [[5, 6, 7, 8, 9], [3, 4], [10, 11, 12, 13, 14, 15, 16]]
GRADIENT_TOLERANCE = 1e-5
"""Relative to the greatest gradient: recomputing a batch adds its rows up in another order."""


def lora(seed=0):
    torch.manual_seed(seed)
    return LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )


@pytest.fixture
def planned(tiny_llama):
    return RoutedModel(tiny_llama(), policy=FixedPolicy(PLAN, 6))


def prompts():
    ids, mask = pad_left(PROMPTS, "cpu")
    return {"input_ids": ids, "attention_mask": mask}


def logits(routed, plan=MIXED, model=None):
    with routed.fixed(plan), torch.no_grad():
        return (model or routed.model)(**prompts()).logits


def logits_of_row(routed, plan, prompt):
    with routed.fixed(plan), torch.no_grad():
        return routed.model(torch.tensor([prompt])).logits[0]


def slow(model, plan=MIXED):
    return [
        ListedModel(model, row).logits(prompt) for row, prompt in zip(plan, PROMPTS, strict=True)
    ]


def assert_same(expected, found):
    positions = prompts()["attention_mask"].sum(1)
    for row, (alone, together) in enumerate(zip(expected, found, strict=True)):
        assert len(alone) == positions[row]
        torch.testing.assert_close(alone, together[-len(alone) :], atol=LOGIT_TOLERANCE, rtol=0)


# --- adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["adapter", "routing"])
def test_an_adapter_is_routed_whichever_is_attached_first(tiny_llama, first):
    merged = get_peft_model(tiny_llama(), lora()).merge_and_unload()
    if first == "adapter":
        adapted = get_peft_model(tiny_llama(), lora())
        routed = RoutedModel(adapted)
    else:
        routed = RoutedModel(tiny_llama())
        adapted = get_peft_model(routed.model, lora())
    assert_same(slow(merged), logits(routed, model=adapted))
    assert routed.detach() is (adapted if first == "adapter" else adapted.get_base_model())


def test_an_adapted_model_generates_under_routing(tiny_llama):
    routed = RoutedModel(get_peft_model(tiny_llama(), lora()))
    twin = RoutedModel(routed.detach().merge_and_unload())
    with twin.fixed(MIXED):
        expected = twin.generate(**prompts(), max_new_tokens=8, do_sample=False)
    assert expected.shape == (3, 15)
    again = RoutedModel(get_peft_model(tiny_llama(), lora()))
    with again.fixed(MIXED):
        assert torch.equal(expected, again.generate(**prompts(), max_new_tokens=8, do_sample=False))


# PEFT before 0.21 takes the empty name of a model made from a configuration for one on the hub.
@pytest.mark.filterwarnings("ignore:Could not find a config file in  -:UserWarning")
def test_adapter_weights_keep_their_names(tiny_llama, tmp_path):
    plain = get_peft_model(tiny_llama(), lora())
    adapted = get_peft_model(RoutedModel(tiny_llama()).model, lora())
    assert list(plain.state_dict()) == list(adapted.state_dict())
    adapted.save_pretrained(tmp_path)
    assert isinstance(PeftModel.from_pretrained(tiny_llama(), tmp_path), PeftModel)


# --- accelerate --------------------------------------------------------------------------------


def dispatched(model):
    names = [name for name, _ in model.named_children()]
    accelerate.dispatch_model(model, dict.fromkeys(names, "cpu"), force_hooks=True)


def offloaded(model):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("put", [dispatched, offloaded])
def test_a_model_whose_weights_are_elsewhere_is_routed(tiny_llama, put):
    model = tiny_llama()
    expected = slow(model)
    put(model)
    assert_same(expected, logits(RoutedModel(model)))


def test_hooks_put_on_after_routing_keep_it(tiny_llama):
    model = tiny_llama()
    expected = slow(model)
    routed = RoutedModel(model)
    for layer in model.model.layers:
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    assert_same(expected, logits(routed))
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_same(expected, logits(routed))
    routed.detach()


def test_hooks_removed_from_under_routing_are_noticed(tiny_llama):
    model = tiny_llama()
    accelerate.hooks.add_hook_to_module(model.model.layers[2], accelerate.hooks.ModelHook())
    routed = RoutedModel(model)
    accelerate.hooks.remove_hook_from_submodules(model)  # restores the forward from before ours
    with pytest.raises(RoutingError, match="layer 2 was taken off the model by other code"):
        logits(routed)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch.ao
def test_a_model_with_quantised_weights_is_routed(tiny_llama):
    model = torch.ao.quantization.quantize_dynamic(tiny_llama(), {torch.nn.Linear})
    one_by_one = [
        logits_of_row(RoutedModel(copy.deepcopy(model)), plan, prompt)
        for plan, prompt in zip(MIXED, PROMPTS, strict=True)
    ]
    # Row by row on both sides: what a batch is quantised to depends on all of its rows.
    for alone, expected in zip(one_by_one, slow(model), strict=True):
        torch.testing.assert_close(expected, alone, atol=LOGIT_TOLERANCE, rtol=0)


# --- gradients ---------------------------------------------------------------------------------


def gradients(model, plan, reentrant=None, attach=True):
    """Return the gradient of every parameter after one step on the prompts."""
    model = copy.deepcopy(model).train().requires_grad_(True)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    routed = RoutedModel(model)
    with routed.fixed(plan):
        loss = model(**prompts(), labels=prompts()["input_ids"]).loss
    loss.backward()  # outside the block: what is recomputed must not ask again
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("plan", [PLAN, MIXED], ids=["one plan", "a plan a row"])
@pytest.mark.filterwarnings("ignore:.*use_reentrant.*", "ignore:None of the inputs:UserWarning")
def test_gradient_checkpointing_leaves_every_gradient_as_it_is(tiny_llama, plan, reentrant):
    model = tiny_llama()
    expected, found = gradients(model, plan), gradients(model, plan, reentrant)
    for name, gradient in expected.items():
        if gradient is None:  # a layer that no row runs
            assert found[name] is None
        else:
            tolerance = GRADIENT_TOLERANCE * float(gradient.abs().max())
            torch.testing.assert_close(gradient, found[name], atol=tolerance, rtol=0)


def test_two_checkpointed_passes_before_one_backward_keep_their_plans_apart(tiny_llama):
    def run(checkpointed):
        model = tiny_llama().train().requires_grad_(True)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        routed = RoutedModel(model)
        total = 0
        for plan in (PLAN, [1, 2, 0, 1, 1, 1]):
            with routed.fixed(plan):
                total = total + model(**prompts(), labels=prompts()["input_ids"]).loss
        total.backward()
        return model.model.layers[2].mlp.down_proj.weight.grad

    expected = run(False)
    tolerance = GRADIENT_TOLERANCE * float(expected.abs().max())
    torch.testing.assert_close(expected, run(True), atol=tolerance, rtol=0)


def test_detaching_leaves_the_checkpointing_function_as_it_was(tiny_llama):
    model = tiny_llama().train().requires_grad_(True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]
    routed = RoutedModel(model)
    model(**prompts())
    routed.detach()
    assert functions == [layer._gradient_checkpointing_func for layer in model.model.layers]


# --- copying and saving ------------------------------------------------------------------------


def test_a_model_saved_whole_is_routed_when_it_is_loaded(planned):
    file = io.BytesIO()
    torch.save(planned.model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(planned.model(**prompts()).logits, loaded(**prompts()).logits)
    expected = planned.generate(**prompts(), max_new_tokens=5, do_sample=False)
    assert torch.equal(expected, loaded.generate(**prompts(), max_new_tokens=5, do_sample=False))


def test_save_pretrained_writes_the_base_model_as_ever(tiny_llama, tmp_path):
    model = tiny_llama()
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = model(**prompts()).logits
    RoutedModel(model, policy=FixedPolicy(PLAN, 6)).model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is LlamaForCausalLM
    assert keys == list(loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(expected, loaded(**prompts()).logits)


# --- running it --------------------------------------------------------------------------------


def test_a_text_generation_pipeline_is_routed(planned, tiny_tokenizer):
    text = "to be or not"
    options = {"max_new_tokens": 8, "do_sample": False}
    ids = tiny_tokenizer(text, return_tensors="pt")
    expected = tiny_tokenizer.decode(
        planned.generate(**ids, **options)[0], skip_special_tokens=True
    )
    run = pipeline("text-generation", model=planned.model, tokenizer=tiny_tokenizer)
    assert run(text, **options)[0]["generated_text"] == expected
    planned.detach()
    assert run(text, **options)[0]["generated_text"] != expected


@pytest.fixture
def log_of_transformers(caplog):
    """Capture the errors that transformers logs; its logger doesn't propagate."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.ERROR):  # the handler serves later tests too, so it's put back
        yield caplog
    logger.removeHandler(caplog.handler)


def test_a_pipeline_takes_a_routed_model_without_logging_an_error(
    planned, tiny_tokenizer, log_of_transformers
):
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = pipeline("text-generation", model=planned.model, tokenizer=tiny_tokenizer)
    try:
        run = pipeline("text-generation", model=planned, tokenizer=tiny_tokenizer)
    except TypeError as error:
        if "Could not infer framework" not in str(error):
            raise
        pytest.skip("pipelines of this transformers read the framework from the model's class")
    assert run("to be or not", **options) == expected("to be or not", **options)
    assert planned.last_route.tolist() == [PLAN]
    assert not log_of_transformers.records


# --- training it -------------------------------------------------------------------------------


def make_trainer(model, folder):
    """A trainer of transformers with two steps of training."""
    rows = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ROWS]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows)


@pytest.fixture
def trained_weights(tiny_llama, tmp_path):
    """The weights of the plain model after two steps with a trainer of transformers."""
    model = tiny_llama().requires_grad_(True)
    try:
        make_trainer(model, tmp_path).train()
    except TypeError as error:
        if "keep_torch_compile" not in str(error):
            raise
        pytest.skip("this accelerate is too old for this trainer, which can't train any model")
    return model.state_dict()


def test_a_trainer_says_to_pass_the_model_under_a_routed_model(planned, trained_weights, tmp_path):
    with pytest.raises(AttributeError, match=r"torch\.nn\.Module; give routed\.model instead"):
        make_trainer(planned, tmp_path).train()


def test_a_trainer_trains_the_base_model_with_routing_off(planned, trained_weights, tmp_path):
    model = planned.requires_grad_().model
    with planned.disabled():
        make_trainer(model, tmp_path).train()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, trained_weights[name]), name
    with pytest.raises(RoutingError, match="no prompt has passed"):
        _ = planned.last_route


def test_a_trainer_trains_the_layers_of_the_plan(planned, trained_weights, tmp_path):
    start_weights = planned.model.state_dict()
    start_weights = {name: weight.clone() for name, weight in start_weights.items()}
    model = planned.requires_grad_().model
    make_trainer(model, tmp_path).train()
    assert planned.last_route.tolist()[0] == PLAN
    for layer, decision in enumerate(PLAN):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        is_unchanged = torch.equal(model.state_dict()[name], start_weights[name])
        assert is_unchanged == (decision == 0), layer


def compiled(model, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="eager", **options)


@needs_tracing
@pytest.mark.thorough
@pytest.mark.parametrize("plan", [PLAN, MIXED], ids=["one plan", "a plan a row"])
def test_a_plan_compiles_to_one_graph(tiny_llama, plan):
    routed = RoutedModel(tiny_llama(), policy=FixedPolicy(plan, 6))
    with torch.no_grad():
        expected = routed.model(**prompts()).logits
        fast = compiled(routed.model, fullgraph=True)
        assert torch.equal(expected, fast(**prompts()).logits)
        assert routed.last_route.tolist() == (MIXED if plan is MIXED else [PLAN] * 3)


@needs_tracing
@pytest.mark.thorough
def test_a_compiled_model_follows_a_change_of_plan(planned):
    fast = compiled(planned.model)
    with torch.no_grad():
        fast(**prompts())
        for plan in ([1] * 6, [2, 1, 1, 0, 1, 1], PLAN):
            with planned.fixed(plan):  # breaks the graph, and is right all the same
                expected = planned.model(**prompts()).logits
                assert torch.equal(expected, fast(**prompts()).logits)


@needs_tracing
@pytest.mark.thorough
def test_decoding_with_a_compiled_model_follows_the_pinned_route(tiny_llama):
    routed = RoutedModel(tiny_llama(), tiny_routers())
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = routed.generate(**prompts(), **options)
    assert len({tuple(row) for row in routed.last_route.tolist()}) > 1, "the sample must be a test"
    routed.model.forward = compiled(routed.model.forward)
    assert torch.equal(expected, routed.generate(**prompts(), **options))


LIMIT = {"fail_on_recompile_limit_hit": True, "recompile_limit": 8}
"""Has torch raise where it would give up compiling a function, which it only warns of else.

The limit is torch's own. transformers up to 5.0 sets it to 64 for the whole process once it has
read a prompt in chunks, as another test may have let it.
"""


@needs_tracing
@pytest.mark.thorough
def test_routers_in_a_compiled_model_never_meet_the_limit_of_recompilations(tiny_llama):
    routed = RoutedModel(tiny_llama(num_layers=12), tiny_routers(num_layers=12))
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    asked = [torch.randint(3, 100, (1 + n % 3, 6 + n)) for n in range(12)]
    expected, routes = [], set()
    for ids in asked:
        expected.append(routed.generate(ids, **options))
        routes |= set(map(tuple, routed.last_route.tolist()))
    assert len(routes) > LIMIT["recompile_limit"], "the sample must be a test"
    routed.model.forward = compiled(routed.model.forward)
    with torch._dynamo.config.patch(LIMIT):
        found = [routed.generate(ids, **options) for ids in asked]
    assert all(map(torch.equal, found, expected))


@needs_tracing
@pytest.mark.thorough
@pytest.mark.parametrize("cache", [None, "static"])
def test_decoding_along_a_plan_is_one_graph_for_all_layers(tiny_llama, cache):
    plan = [1, 0, 2, 1, 0, 1] * 2
    routed = RoutedModel(tiny_llama(num_layers=12), policy=FixedPolicy(plan, 12))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options |= {"cache_implementation": cache, "disable_compile": True} if cache else {}
    ids = prompts()["input_ids"][:1]
    expected = routed.generate(ids, **options)
    routed.model.forward = compiled(routed.model.forward)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(LIMIT):
        assert torch.equal(routed.generate(ids, **options), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_decoding_along_a_plan_runs_in_cuda_graphs(tiny_llama):
    model = tiny_llama().to("cuda")
    routed = RoutedModel(model, policy=FixedPolicy(PLAN, 6))
    ids = prompts()["input_ids"][:1].to("cuda")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    options |= {"cache_implementation": "static", "disable_compile": True}
    expected = routed.generate(ids, **options)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, mode="reduce-overhead")
    assert torch.equal(routed.generate(ids, **options), expected)
