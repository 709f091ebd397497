"""Mutations of packing, layout, weight export and hand-over (``mutate.py`` runs them).

Each names one fast test that notices it.
"""

from mutate import of_file

PACKING = "unit_tests/test_data_packing.py::test"
DEALING = "unit_tests/test_data_dealing.py::test"
LAYOUT = "unit_tests/test_platform.py::test_places_and_ranks_are_inverse"
EXPORT = "distributed/test_logits.py::test_tiny_logits_and_export"
FOLDER = "unit_tests/test_weight_mailbox.py::test"
STEP = "unit_tests/test_step.py::test"
CHOICES = "unit_tests/test_choices.py::test"
CHANNEL = "unit_tests/test_weight_transports.py::test"
LORA = "distributed/test_lora.py::test"
VIRTUAL = "distributed/test_virtual_pipeline.py::test"


MUTATIONS = (
    *of_file(
        "data/batch.py",
        (
            "labels are the tokens themselves",
            "_padded(column[1 : stop + 1], 0, length)",
            "_padded(column[:stop], 0, length)",
            f"{PACKING}_a_row_by_hand",
        ),
        (
            "writers are those of the token before",
            '"writers": sequence.writer_N,',
            '"writers": np.roll(sequence.writer_N, 1),',
            f"{PACKING}_a_row_by_hand",
        ),
        (
            "log-probs one position early",
            'getattr(sequence, f"{name}_N"), np.float32(0))',
            'np.roll(getattr(sequence, f"{name}_N"), -1), np.float32(0))',
            f"{PACKING}_a_row_by_hand",
        ),
        (
            "draws keyed by the place in the list",
            "keyed_uniform(seed, step, k.draw, p) for k, p in zip(keys,",
            "keyed_uniform(seed, step, k, p) for k, p in zip(rows,",
            f"{PACKING}_order_of_the_list_changes_no_draw",
        ),
        (
            "the same draws in every step",
            "keyed_uniform(seed, step, k.draw",
            "keyed_uniform(seed, 0, k.draw",
            f"{PACKING}_draws_differ_by_step_seed_and_trajectory",
        ),
    ),
    *of_file(
        "data/dealing.py",
        (
            "one row more than the budget",
            "fit = min(self._budget // self._padded[start], rows - start)",
            "fit = min(self._budget // self._padded[start] + 1, rows - start)",
            f"{PACKING}_nothing_lost_and_budget_kept",
        ),
        (
            "rows in the order of the list",
            "key=lambda i: (-lengths[i], i)",
            "key=lambda i: i",
            f"{PACKING}_sorting_keeps_padding_small",
        ),
        (
            "the heaviest to who has most",
            "key=lambda rank: (loads[rank], rank)",
            "key=lambda rank: (-loads[rank], rank)",
            f"{DEALING}_work_is_even_and_padding_small",
        ),
        (
            "cut by positions, not by work",
            "of_length = {length: work(length) for length in set(padded)}",
            "of_length = {length: float(length) for length in set(padded)}",
            f"{DEALING}_the_heaviest_batch_is_as_light_as_any_cut_makes_it",
        ),
    ),
    *of_file(
        "data/packing.py",
        (
            "every replica gets the first one's rows",
            "sequences, dealt(sequences, **how).replicas[dp_rank]",
            "sequences, dealt(sequences, **how).replicas[0]",
            f"{PACKING}_layout_changes_no_token",
        ),
        (
            "no padding to a multiple",
            "return -(-number // multiple) * multiple",
            "return number",
            f"{PACKING}_layout_changes_no_token",
        ),
        (
            "masked tokens of the teacher count",
            "teacher += int((kept_N & (t.writer_N == Writer.TEACHER)).sum())",
            "teacher += int((t.writer_N == Writer.TEACHER).sum())",
            f"{PACKING}_counts_agree_with_the_masks_of_all_ranks",
        ),
        (
            "an id is masked at its last occurrence",
            "weight_N[places[:1]] = 0",
            "weight_N[places[-1:]] = 0",
            f"{PACKING}_the_first_occurrence_of_an_id_in_a_response_is_masked_whoever_wrote_it",
        ),
    ),
    *of_file(
        "data/batch.py",
        (
            "tokens of a part of a row keep their places in the whole one",
            "loss_at=(self.loss_at // length * len(positions) + place_T)[kept],",
            "loss_at=self.loss_at[kept],",
            f"{PACKING}_parts_of_rows_together_hold_every_token_as_it_was",
        ),
    ),
    *of_file(
        "mcore/layout.py",
        (
            "replicas and stages change places",
            "return (pp_rank * self.dp_size * self.cp_size + replica) * self.tp_size + tp_rank",
            "return (replica * self.pp_size + pp_rank) * self.tp_size + tp_rank",
            LAYOUT,
        ),
        (
            "a rank of a row has two chunks from its front",
            "chunks[cp_rank], chunks[-1 - cp_rank]",
            "chunks[cp_rank], chunks[cp_rank + cp_size]",
            f"{PACKING}_a_rank_has_a_chunk_and_its_mirror_image_as_megatron_deals_them",
        ),
        (
            "chunks take any number of micro-batches",
            "return self.pp_size if self.vp_size > 1 else 1",
            "return 1",
            f"{VIRTUAL}_losses_and_grad_norms_are_those_without",
        ),
        (
            "shards of an expert count as parts of the experts",
            "return rank // self.etp_size % self.ep_size",
            "return rank % self.ep_size",
            LAYOUT,
        ),
        (
            "a neighbour is the next rank",
            "return rank + (ep_rank - self.ep_rank_of(rank)) * self.etp_size",
            "return rank + (ep_rank - self.ep_rank_of(rank))",
            LAYOUT,
        ),
        (
            "the first stage has the loss",
            "return self.pp_rank == self.pp_size - 1",
            "return self.pp_rank == 0",
            f"{EXPORT}[2]",
        ),
    ),
    *of_file(
        "mcore/weights.py",
        (
            "every chunk counts its layers from the first",
            "first = chunk.decoder.layers[0].layer_number - 1",
            "first = 0",
            f"{EXPORT}[2]",
        ),
        (
            "every rank reads the first shard",
            "place = (layout.tp_rank, layout.tp_size) if",
            "place = (0, layout.tp_size) if",
            f"{EXPORT}[2]",
        ),
        (
            "shards in the wrong order",
            "return everything if layout.tp_rank in places else None",
            "return everything.flip(0) if layout.tp_rank in places else None",
            f"{EXPORT}[2]",
        ),
        (
            "the tied copy of the last stage is not filled",
            "shard = entry.operation.read(source, *place)",
            'shard = entry.operation.read(source, *place) * (name != "output_layer.weight")',
            f"{EXPORT}[2]",
        ),
        (
            "every rank has the first experts",
            "first_expert = layout.ep_rank * shape.experts.count // layout.ep_size if",
            "first_expert = 0 * shape.experts.count // layout.ep_size if",
            f"{EXPORT}[2]",
        ),
        (
            "experts come from the receiver's own rank",
            "rank if self.home.ep_rank is None else layout.neighbour(rank, self.home.ep_rank)",
            "rank",
            f"{EXPORT}[2]",
        ),
    ),
    *of_file(
        "mcore/export.py",
        (
            "files are never full",
            "SafetensorsWriter(folder, specs, max_file_bytes)",
            "SafetensorsWriter(folder, specs, 10**12)",
            f"{EXPORT}[1]",
        ),
    ),
    *of_file(
        "mcore/student.py",
        (
            "what is not to be trained is trained",
            "chunk.requires_grad_(False)",
            "chunk.requires_grad_(True)",
            "distributed/test_student_model.py",
        ),
    ),
    *of_file(
        "mcore/lora.py",
        (
            "gradients of a part of the positions are not summed",
            "self.shared.sequence_parallel = sequence_parallel",
            "self.shared.sequence_parallel = False",
            f"{LORA}_losses_and_gradients_are_those_of_one_rank[qwen2]",
        ),
        (
            "an expert's shared matrix gets one rank's gradient",
            "self._shared_of = partial(copy_to_tensor_model_parallel_region, group=group)",
            "self._shared_of = _as_it_is",
            f"{LORA}_losses_and_gradients_are_those_of_one_rank[qwen3_moe]",
        ),
        (
            "nothing before the first adapter has a gradient",
            "output.requires_grad_(True)",
            "pass",
            f"{LORA}_losses_and_gradients_are_those_of_one_rank[qwen2]",
        ),
        (
            "ranks drop different parts of the same input",
            "of_all if input_is_shared else of_a_part",
            "of_a_part",
            f"{LORA}_dropout_is_the_same_for_ranks_that_share_an_input",
        ),
        (
            "merged without the scale",
            "return self.scale * (self.B.flatten(0, -2).float() @ self.A.float())",
            "return self.B.flatten(0, -2).float() @ self.A.float()",
            f"{LORA}_merged_folder_and_adapter_folder_give_our_logits[qwen2]",
        ),
    ),
    *of_file(
        "convert/adapters.py",
        (
            "keys get the B of queries",
            "b: Operation = replace(layer, query=query, key=key, value=value, columns=(rank,))",
            "b: Operation = replace(layer, query=key, key=query, value=value, columns=(rank,))",
            f"{LORA}_merged_folder_and_adapter_folder_give_our_logits[qwen2]",
        ),
    ),
    *of_file(
        "rollout/weights/mailbox.py",
        (
            "a bucket overwrites the one before",
            "bucket, size, count = {}, 0, count + 1",
            "bucket, size, count = {}, 0, count",
            f"{FOLDER}_weights_are_written_in_buckets_one_version_at_a_time",
        ),
        (
            "tensors that share memory are not told apart",
            "bucket[name] = tensor.clone()",
            "pass",
            f"{FOLDER}_tensors_that_share_memory_are_written_each",
        ),
        (
            "the folders of living runs are removed",
            "except BlockingIOError:\n                continue",
            "except BlockingIOError:\n                pass",
            f"{FOLDER}_living_mailboxes_are_kept_and_left_overs_removed",
        ),
    ),
    *of_file(
        "rollout/engines/transports.py",
        (
            "each tensor at the start of the buffer",
            "self._buffer[self._used : self._used + flat.numel()].copy_(flat)",
            "self._buffer[: flat.numel()].copy_(flat)",
            f"{CHANNEL}_an_engine_reads_one_buffer_after_the_other",
        ),
        (
            "the last buffer is not handed over",
            "        self._flush()\n        self._tell(lambda engine: engine.finish_weights())",
            "        self._tell(lambda engine: engine.finish_weights())",
            f"{CHANNEL}_an_engine_reads_one_buffer_after_the_other",
        ),
        (
            "all ranks of an engine sit on its first GPU",
            "wanted = (seat.host, seat.device + offset)",
            "wanted = (seat.host, seat.device)",
            f"{CHANNEL}_an_engine_reads_from_the_ranks_on_its_gpus",
        ),
    ),
)
