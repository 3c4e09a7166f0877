import pytest

from clip_phi.training.arguments import Stage1Arguments, Stage2Arguments, parse_arguments


def test_defaults_are_the_real_recipe():
    stage1, stage2 = parse_arguments(["--stage", "1"]), parse_arguments(["--stage", "2"])
    assert isinstance(stage1, Stage1Arguments) and isinstance(stage2, Stage2Arguments)
    assert stage1.vision_backbone == "wkcn/TinyCLIP-ViT-61M-32-Text-29M-LAION400M"
    assert stage1.text_backbone == "microsoft/phi-2"
    assert stage1.data == ["coco:data/coco/annotations/captions_train2017.json,images=data/coco/train2017"]
    assert stage2.data == ["llava:data/llava_instruct_150k.json,images=data/coco/train2017"]
    assert (stage1.learning_rate, stage2.learning_rate, stage2.lora_learning_rate) == (1e-3, 2e-5, 2e-4)
    assert (stage1.optim, stage1.captions_per_image, stage2.init_from) == ("auto", 5, stage1.output_dir)


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage: 2\nlearning_rate: 1e-4\nmax_steps: 7\nmerged: true\n")
    arguments = parse_arguments(["--config", str(recipe), "--max_steps", "3"])
    assert isinstance(arguments, Stage2Arguments)
    assert (arguments.learning_rate, arguments.max_steps, arguments.merged) == (1e-4, 3, True)
    assert arguments.lora_r == 64


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--stage is missing"),
        (["--stage", "3"], "unknown --stage 3: it is one of 1, 2"),
        (["--stage", "1", "--lora_r", "4"], "unknown option in stage 1: --lora_r 4"),
        (["--stage", "1", "--learning_rat", "4"], "unknown option in stage 1: --learning_rat 4"),
        (["--stage", "2", "--max_steps", "many"], "--max_steps"),
        (["--stage", "2", "--optim", "sgd"], "invalid choice: 'sgd'"),
        (["--config", "none.yaml"], "no such file: --config none.yaml"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: 1\nlearning_rat: 3\n", "unknown option in {}: learning_rat (stage 1)"),
        ("stage: 1\nmax_steps: [3]\n", "{}: max_steps must be int, not [3]"),
        ("- 1\n", "must be a mapping"),
        ("a: b: c\n", "is not yaml"),
    ],
)
def test_a_bad_recipe_is_one_line_and_status_2(text, message, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--config", str(recipe)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message.format(recipe) in error and error.count("\n") == 1


def test_all_problems_are_reported_at_once_with_a_way_out():
    arguments = parse_arguments(["--stage", "2", "--lora_r", "0", "--learning_rate", "0", "--max_length", "0"])
    with pytest.raises(ValueError) as caught:
        arguments.check()
    for part in (
        "--lora_r must be at least 1",
        "--learning_rate must be more than 0",
        "--max_length must be at least 1",
        "data/llava_instruct_150k.json, data/coco/train2017",
        "liuhaotian/LLaVA-Instruct-150K",
        "'make demo' needs no data",
    ):
        assert part in str(caught.value)
