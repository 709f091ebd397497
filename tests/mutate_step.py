"""Mutations of the distillation step (``mutate.py`` runs them).

Each names one fast test that notices it; that of the loop around the step needs an engine.
"""

from mutate import Mutation, of_file

STEP = "unit_tests/test_step.py::test"
CHOICES = "unit_tests/test_choices.py::test_the_gradient"
METRICS = "unit_tests/test_step_metrics.py::test"
RUN = "integration/test_methods.py::test"

MUTATIONS: tuple[Mutation, ...] = (
    *of_file(
        "distill/step.py",
        (
            "the teacher does not hear of the step",
            "    parts.teacher.begin(step, sequences)\n",
            "",
            f"{STEP}_the_teacher_hears_of_the_step_before_it_scores_and_the_update_comes_last",
        ),
        (
            "a loss that is not finite reaches the optimizer",
            "    _check_finite(totals.first_bad_token, sequences, step)\n",
            "",
            f"{STEP}_a_loss_that_is_not_finite_changes_nothing",
        ),
        (
            "nobody compares engine and trainer",
            "        parts.engine_gap.check(metrics, sequences, step)\n",
            "        pass\n",
            f"{STEP}_an_engine_of_another_model_is_noticed_before_the_update_once_it_has_these_weights",
        ),
        (
            "a loss that switches stays in its first phase",
            "loss = parts.loss.at_step(step)",
            "loss = parts.loss.at_step(0)",
            f"{STEP}_a_loss_that_switches_is_that_of_the_step",
        ),
        (
            "every rank of a vocabulary counts its tokens",
            "counted=ranks.is_last_stage and ranks.tp_rank == 0",
            "counted=ranks.is_last_stage",
            f"{STEP}_one_rank_of_a_vocabulary_counts",
        ),
    ),
    *of_file(
        "distill/step_loss.py",
        (
            "teacher tokens have the weight of others",
            "beta=parts.beta,",
            "beta=1.0,",
            f"{CHOICES}_of_entropy_opd",
        ),
        (
            "the teacher's signals are those of the micro-batch before",
            "self._signals[index],",
            "self._signals[index - 1],",
            f"{CHOICES}_of_entropy_opd",
        ),
        (
            "weights of the segments change places",
            "torch.where(is_teacher_T, teacher, student)",
            "torch.where(is_teacher_T, student, teacher)",
            f"{CHOICES}_of_entropy_opd",
        ),
        (
            "tokens that were not selected are trained",
            "weights_T if selected is None else weights_T * selected[index]",
            "weights_T",
            f"{CHOICES}_of_entropy_opd",
        ),
        (
            "rewards of another micro-batch",
            "else rewards[index],",
            "else rewards[index].roll(1),",
            f"{CHOICES}_of_top_d",
        ),
        (
            "tokens that were not selected are in the denominator",
            "trained = num_selected(config.trained_share, counts.student)",
            "trained = counts.student",
            f"{METRICS}_a_selection_is_divided_by_the_tokens_it_keeps",
        ),
        (
            "the separate denominator is the joint one",
            "teacher, student = (total / count if count",
            "teacher, student = (1.0 if count",
            f"{METRICS}_segment_weights_turn_the_joint_denominator_into_the_separate_one",
        ),
    ),
    *of_file(
        "distill/token_choices.py",
        (
            "every sequence is a prompt of its own",
            "[numbers.setdefault(prompt, len(numbers)) for prompt in prompts]",
            "[numbers.setdefault(i, len(numbers)) for i in range(len(prompts))]",
            f"{CHOICES}_of_top_d",
        ),
        (
            "teacher tokens count as the student's in the selection",
            "batches, prompts, counts.student,",
            "batches, prompts, counts.student + counts.teacher,",
            f"{CHOICES}_of_entropy_opd",
        ),
        (
            "sign of the advantage",
            "log_ratio_T=log_ratio_T,",
            "log_ratio_T=-log_ratio_T,",
            f"{CHOICES}_of_top_d",
        ),
        (
            "rows of different micro-batches are one row",
            "own_rows.append(batch.loss_at // length + rows)",
            "own_rows.append(batch.loss_at // length)",
            f"{CHOICES}_of_top_d",
        ),
        (
            "the teacher's tokens may be selected",
            "b.of_loss_tokens(b.writers) == Writer.STUDENT for b in batches",
            "b.of_loss_tokens(b.writers) != Writer.CONTEXT for b in batches",
            f"{CHOICES}_of_entropy_opd",
        ),
        (
            "the student's tokens are taken for the teacher's",
            "is_teacher_T=batch.of_loss_tokens(batch.writers) == Writer.TEACHER",
            "is_teacher_T=batch.of_loss_tokens(batch.writers) == Writer.STUDENT",
            f"{CHOICES}_of_entropy_opd",
        ),
    ),
    *of_file(
        "distill/step_records.py",
        (
            "examples are those of the row in its micro-batch",
            "mine_T = batch.loss_rows == row",
            "mine_T = batch.loss_rows == batch.rows[0]",
            f"{STEP}_examples_are_those_of_their_sequences",
        ),
    ),
    *of_file(
        "distill/engine_gap.py",
        (
            "samples of older weights are compared too",
            "if self._compared or not own or",
            "if self._compared or",
            f"{STEP}_an_engine_of_another_model_is_noticed_before_the_update_once_it_has_these_weights",
        ),
    ),
    *of_file(
        "distill/metrics.py",
        (
            "the teacher's tokens are in the means",
            "scalars[metric] = of_student(values.get(key, absent)).double().sum()",
            "scalars[metric] = values.get(key, absent).double().sum()",
            f"{METRICS}_means_are_over_student_tokens_and_the_loss_over_all",
        ),
        (
            "gaps to the engine cancel out",
            '"engine_gap_mean": gap_U.abs().sum(),',
            '"engine_gap_mean": gap_U.sum().abs(),',
            f"{METRICS}_the_gap_to_the_engine_is_measured_on_student_tokens_only",
        ),
        (
            "the last micro-batch alone counts",
            "        self.sums += torch.cat(",
            "        self.sums = torch.cat(",
            f"{METRICS}_the_split_into_micro_batches_changes_nothing",
        ),
        (
            "the loss is divided by the student's tokens",
            '"loss": _ratio(loss, teacher + student),',
            '"loss": _ratio(loss, student),',
            f"{METRICS}_means_are_over_student_tokens_and_the_loss_over_all",
        ),
        (
            "the last token that is not finite is named",
            "torch.cat([self.bad_token, key_T]).amin(",
            "torch.cat([self.bad_token, torch.where(found_T > 0, key_T, -1)]).amax(",
            f"{METRICS}_the_first_token_with_a_loss_that_is_not_finite_is_found",
        ),
    ),
    *of_file(
        "distill/loop.py",
        (
            "the engine's new weights keep the old number",
            "sync_weights(run, step + 1)",
            "sync_weights(run, step)",
            f"{RUN}_a_method_trains[opd]",
        ),
    ),
)
