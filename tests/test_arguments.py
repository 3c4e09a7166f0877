import dataclasses

import pytest

from clip_phi.training.arguments import GROUPS, Stage1Arguments, Stage2Arguments, parse_arguments


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
        (
            ["--stage", "1", "--lora_r", "4"],
            "unknown option in stage 1: --lora_r 4; it is an option of the other stage",
        ),
        (
            ["--stage", "1", "--learning_rat", "4"],
            "unknown option in stage 1: --learning_rat 4; did you mean --learning_rate?",
        ),
        (["--stage", "2", "--max_steps", "many"], "--max_steps"),
        (["--stage", "2", "--optim", "sgd"], "invalid choice: 'sgd'"),
        (["--config", "none.yaml"], "--config none.yaml cannot be read as yaml: [Errno 2] No such file"),
        (["--config", "."], "--config . cannot be read as yaml: [Errno 21] Is a directory"),
        (["--stage", "1", "--config", ""], "--config  cannot be read as yaml"),
        (["--stage", "1", "--config"], "argument --config: expected one argument"),
        (["--stage", "1", "--given", "3"], "unknown option in stage 1: --given 3"),
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
        (
            "stage: 1\nlearning_rat: 3\n",
            "{}: unknown option in stage 1: --learning_rat=3; did you mean --learning_rate?",
        ),
        ("stage: 1\nmax_steps: [3]\n", "{}: argument --max_steps: invalid int value: \"['3']\""),
        ("- 1\n", "must be a mapping"),
        ("a: b: c\n", "cannot be read as yaml"),
        ("stage: 1\nseed: 1\nseed: 2\n", "--config {}: seed is given twice"),
        ("stage: 1\nconfig: other.yaml\n", "--config {}: config is given twice"),
        ("stage: 1\nseed: 2026-99-99\n", "{}: argument --seed: invalid int value: '2026-99-99'"),
        ("stage: 1\nseed: !!timestamp now\n", "{}: argument --seed: invalid int value: 'now'"),
        ("stage: 1\n--seed: 3\n", "{}: unknown option in stage 1: ----seed=3; did you mean --seed?"),
        ("[" * 5000, "cannot be read as yaml"),
        ("stage: 1\nresume_from_checkpoint: ''\n", "{}: resume_from_checkpoint has no value: leave the line out"),
        ("stage: 1\noutput_dir: null\n", "{}: output_dir has no value: leave the line out"),
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
        "'clip-phi download llava-instruct' downloads it",
        "'make demo' needs no data",
    ):
        assert part in str(caught.value)


def test_numbers_without_meaning_and_empty_texts_are_refused():
    for name in ("weight_decay", "seed", "lora_alpha"):
        assert f"--{name} must be at least" in problems("--stage", "2", f"--{name}", "-1")
    assert "--weight_decay must be at least 0, not nan" in problems("--stage", "1", "--weight_decay", "nan")
    for name in ("resume_from_checkpoint", "output_dir", "cache_features", "push_to_hub", "vision_revision"):
        assert f"--{name} has no value" in problems("--stage", "1", f"--{name}", "")


@pytest.mark.parametrize("stage", [1, 2])
def test_help_lists_every_option_once_in_groups_with_its_default(stage, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--stage", str(stage), "--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    titles = [line.rstrip(":") for line in printed.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["options", *GROUPS]
    kind = {1: Stage1Arguments, 2: Stage2Arguments}[stage]
    listed = [line.split()[0] for line in printed.splitlines() if line.startswith("  --")]
    assert sorted(listed) == sorted(f"--{each.name}" for each in dataclasses.fields(kind) if "help" in each.metadata)
    assert "(default: 0.03)" in printed


def problems(*argv):
    return "; ".join(parse_arguments(list(argv)).problems())


def test_an_option_that_would_have_no_effect_is_refused():
    size = ("--per_device_train_batch_size", "4")
    for argv in (("--stage", "2"), ("--stage", "2", "--max_tokens_per_batch", "900")):
        assert "--per_device_train_batch_size has no effect with --max_tokens_per_batch" in problems(*argv, *size)
    assert "--max_tokens_per_batch 0" in problems("--stage", "2", *size)
    assert "has no effect" not in problems("--stage", "2", *size, "--max_tokens_per_batch", "0")
    assert "has no effect" not in problems("--stage", "1", *size)
    assert "--lora_r has no effect with" in problems("--stage", "2", "--tune_decoder", "full", "--lora_r", "8")
    assert "--holdout_images has no effect" in problems("--stage", "1", "--holdout_images", "8")
    own = problems("--stage", "1", "--data", "llava:nothing.json", "--holdout_images", "8")
    assert "nothing.json" in own and "coco" not in own and "has no effect" not in own
    assert "has no effect" not in problems("--stage", "1", "--holdout_images", "8", "--eval_data")
    assert "--eval_task_images has no effect" in problems("--stage", "1", "--eval_task_images", "8")
    assert "--hub_private_repo has no effect without --push_to_hub" in problems("--stage", "1", "--hub_private_repo")
    for defaults in (("--hub_private_repo", "false"), ("--early_stopping_patience", "0")):
        assert "has no effect" not in problems("--stage", "1", *defaults)
    for images in (("--max_tokens_per_batch", "0"), ("--per_device_train_batch_size", "4")):
        found = problems("--stage", "1", "--tokens_per_optimizer_step", "900", *images)
        assert "--tokens_per_optimizer_step has no effect on batches of images" in found
    steps = ("--tokens_per_optimizer_step", "900", "--gradient_accumulation_steps", "2")
    assert "--gradient_accumulation_steps has no effect with --tokens_per_optimizer_step" in problems(
        "--stage", "2", *steps
    )


def test_the_revision_of_a_folder_is_refused(tmp_path):
    for part in ("vision", "text"):
        revision = (f"--{part}_revision", "main")
        refused = f"--{part}_revision has no effect with a folder"
        assert refused in problems("--stage", "1", *revision, f"--{part}_backbone", str(tmp_path))
        assert refused not in problems("--stage", "1", *revision)


def test_an_option_of_the_file_counts_as_given(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stage: 2\nper_device_train_batch_size: 4\n")
    assert "--per_device_train_batch_size has no effect" in problems("--config", str(recipe))


def test_a_value_of_the_file_is_the_text_that_is_written_there(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "stage: 1\nmixed_precision: no\ntf32: off\nseed: 010\ndata: ['--seed=5', b.json]\neval_data: []\n"
    )
    arguments = parse_arguments(["--config", str(recipe)])
    assert (arguments.mixed_precision, arguments.tf32, arguments.seed) == ("no", False, 10)
    assert (arguments.data, arguments.eval_data) == (["--seed=5", "b.json"], [])


def test_a_list_that_is_given_twice_is_joined_as_in_other_commands():
    arguments = parse_arguments(
        ["--stage", "1", "--data", "a", "b", "--data", "c", "--eval_data", "d", "--eval_data", "e"]
    )
    assert (arguments.data, arguments.eval_data) == (["a", "b", "c"], ["d", "e"])


def test_bare_options_and_options_with_a_value():
    arguments = parse_arguments(["--stage", "1", "--resume_from_checkpoint", "--merged", "--tf32", "false"])
    assert (arguments.resume_from_checkpoint, arguments.merged, arguments.tf32) == ("newest", True, False)
    assert parse_arguments(["--stage", "1", "--resume_from_checkpoint", "a/b"]).resume_from_checkpoint == "a/b"
    assert parse_arguments(["--stage", "1"]).resume_from_checkpoint is None


def test_workers_are_as_many_as_the_cores_of_each_process_of_the_launcher(monkeypatch):
    for cores, processes, workers in ((12, 1, 8), (2, 1, 2), (1, 1, 1), (16, 8, 2), (4, 8, 1)):
        monkeypatch.setattr("clip_phi.training.arguments.cpu_cores", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert parse_arguments(["--stage", "1"]).dataloader_num_workers == workers
