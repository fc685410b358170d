"""Mistakes that could be made in the product, each with a test that fails for it.

`make mutants` plants one at a time in a copy of the tree and runs its test alone. A mistake that
a test lets through means that the test no longer checks what it is there for.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Mutant(NamedTuple):
    """One planted mistake; `right` stands exactly once in the file."""

    file: str
    right: str
    wrong: str
    test: str
    """The node id of a test function."""


_RULES: Final = "worker/rules.py"
_CHECKS: Final = "worker/checks.py"
_ADMISSION: Final = "worker/drain/admission.py"
_PATH: Final = "worker/drain/path.py"
_AUTH: Final = "worker/auth.py"
_STATEMENTS: Final = "worker/db/statements.py"
_SCRIPTS: Final = "producers/inbox/scripts"

_OF_RULES: Final = "tests/unit/test_rules.py::test_"
_OF_ADMISSION: Final = "tests/unit/test_admission.py::test_"
_OF_AUTH: Final = "tests/unit/test_auth.py::test_"
_OF_DRAIN: Final = "tests/integration/test_drain.py::test_"
_OF_INBOX: Final = "tests/integration/test_inbox.py::test_"
_OF_REPOSITORY: Final = "tests/integration/test_repository.py::test_"

MUTANTS: Final = (
    # --- The rules -------------------------------------------------------------------------------
    Mutant(  # metadata are no part of a tag's identity
        _RULES,
        "        if digest in active:\n            return",
        "        if active:\n            return",
        f"{_OF_RULES}each_operation_sees_what_the_ones_before_it_did",
    ),
    Mutant(  # removing with metadata removes by name
        _RULES,
        "digests = [digest] if digest in active else []",
        "digests = list(active)",
        f"{_OF_RULES}each_operation_sees_what_the_ones_before_it_did",
    ),
    Mutant(  # removing by name removes one tag
        _RULES,
        "digests = sorted(active, key=lambda it: (active[it].created_at, active[it].id.int))",
        "digests = list(active)[:1]",
        f"{_OF_RULES}removing_by_name_reports_every_tag_that_went",
    ),
    Mutant(  # what is added and removed in one transaction stays active
        _RULES,
        "            self.change_set.added[tag.id.int] = new._replace(tag=tag)\n        changes",
        "            pass\n        changes",
        f"{_OF_RULES}a_tag_that_comes_and_goes_in_one_transaction_leaves_a_deleted_row",
    ),
    Mutant(  # an empty list of task names allows every name
        _CHECKS,
        "if not execution.any_task_name and named.task_name not in execution.task_names:",
        "if execution.task_names and named.task_name not in execution.task_names:",
        f"{_OF_RULES}an_execution_without_task_names_has_no_tasks",
    ),
    Mutant(  # a second registration replaces the names of the first
        _RULES,
        "all_names = known.task_names | names",
        "all_names = names",
        f"{_OF_RULES}task_names_only_ever_grow",
    ),
    Mutant(  # revisions count changes, not batches
        _RULES,
        "execution.revision += 1",
        "execution.revision += event.count(b'\"change\":')",
        f"{_OF_RULES}a_batch_may_span_executions_and_counts_each_ones_revision",
    ),
    Mutant(  # the event has the revision before the batch
        _RULES,
        "revision=execution.revision + 1,",
        "revision=execution.revision,",
        f"{_OF_RULES}a_batch_may_span_executions_and_counts_each_ones_revision",
    ),
    Mutant(  # a copy in the same group is applied again
        _RULES,
        "self.snapshot.batches[message.batch_id] = StoredResult(digest, record, events)",
        "pass",
        f"{_OF_RULES}the_same_batch_again_gets_the_stored_answer_and_changes_nothing",
    ),
    Mutant(  # the events of a batch that comes again are not published again
        _RULES,
        "return Outcome(known.record, known.events)",
        "return Outcome(known.record)",
        f"{_OF_RULES}the_same_batch_again_gets_the_stored_answer_and_changes_nothing",
    ),
    Mutant(  # another batch under a known id gets the answer of the first
        _RULES,
        "if digest == known.digest:",
        "if digest:",
        f"{_OF_RULES}the_same_id_for_something_else_is_a_conflict",
    ),
    Mutant(  # a state that is repeated is a change
        _RULES,
        "if known is None or known.state != message.state:",
        "if known is None or known.state:",
        f"{_OF_RULES}a_state_is_recorded_once_and_any_state_may_follow",
    ),
    Mutant(  # conditions are not looked at
        _CHECKS,
        "if bool(meant) == condition.exists:",
        "if meant or not condition.exists:",
        f"{_OF_RULES}a_batch_takes_effect_only_if_its_conditions_hold",
    ),
    Mutant(  # a condition does not see what the batches before it in its transaction added
        _RULES,
        "            of_type[key] = None\n",
        "            pass\n",
        f"{_OF_RULES}a_claim_has_one_winner_and_a_decision_counts_once",
    ),
    Mutant(  # set adds, and leaves the others
        _RULES,
        "if it[0] is not wanted]",
        "if it[0] is wanted]",
        f"{_OF_RULES}set_leaves_one_tag_of_its_type",
    ),
    Mutant(  # a state that is the same clears nothing
        _RULES,
        "for tag_type in dict.fromkeys(message.clear or ()):",
        "for tag_type in dict.fromkeys(message.clear or ()) if message.state != 'running' else ():",
        f"{_OF_RULES}a_new_state_clears_approvals_in_one_event",
    ),
    Mutant(  # operations are taken back in the order in which they were done
        _RULES,
        "for each in reversed(some))",
        "for each in some)",
        f"{_OF_RULES}a_batch_that_is_too_large_takes_all_of_its_operations_back",
    ),
    Mutant(  # a removal that is taken back is stored all the same
        _RULES,
        "if self.change_set.removed.pop(tag.id.int, None) is None:",
        "if self.change_set.removed.get(tag.id.int) is None:",
        f"{_OF_RULES}a_batch_that_is_too_large_takes_all_of_its_operations_back",
    ),
    # --- Admission -------------------------------------------------------------------------------
    Mutant(  # a token is good for every organization
        _ADMISSION,
        "if principal.organization_id != organization_id:",
        "if not principal.organization_id:",
        f"{_OF_ADMISSION}a_message_is_refused_for_its_token_before_anything_else",
    ),
    Mutant(  # the scope for tags is enough for all
        _ADMISSION,
        "return (EXECUTIONS_WRITE, WRITE) if removes_tags else (EXECUTIONS_WRITE,)",
        "return (WRITE,)",
        f"{_OF_ADMISSION}a_scope_is_needed_for_each_kind_alone",
    ),
    Mutant(  # a token counts when a worker comes to its message
        _ADMISSION,
        "authorizer.verify(entry.token, entry.accepted_at, now.timestamp())",
        "authorizer.verify(entry.token, now.timestamp(), now.timestamp())",
        f"{_OF_ADMISSION}a_token_that_expired_while_its_message_waited_is_taken",
    ),
    Mutant(  # what is wrong with a message is said to everybody
        _ADMISSION,
        "        broken = error\n        batch_id, reply_to = error.batch_id, "
        "error.reply_to or str(error.batch_id)\n",
        "        broken = error\n        batch_id, reply_to = error.batch_id, "
        "error.reply_to or str(error.batch_id)\n"
        '        fault = ErrorInfo(code="bad_request", message="", details=[])\n'
        "        record = error_record(organization_id, batch_id, fault).encode()\n"
        "        return Refused(entry, reply_to, record)\n",
        f"{_OF_ADMISSION}a_message_is_refused_for_its_token_before_anything_else",
    ),
    # --- Tokens ----------------------------------------------------------------------------------
    Mutant(  # a clock that is ahead makes tokens expire
        _AUTH,
        "used_at = now if at > now + _MAX_AHEAD_SECONDS else at",
        "used_at = at",
        f"{_OF_AUTH}a_clock_that_is_wrong_refuses_no_message_for_good",
    ),
    Mutant(  # there is no leeway
        _AUTH,
        "if used_at > grant.expires_at + LEEWAY_SECONDS:",
        "if used_at > grant.expires_at:",
        f"{_OF_AUTH}a_token_must_be_valid_when_the_message_was_accepted",
    ),
    Mutant(  # the claim that is read last counts
        _AUTH,
        "object_pairs_hook=each_name_once)",
        "object_pairs_hook=dict)",
        f"{_OF_AUTH}a_wrong_token_proves_nothing",
    ),
    Mutant(  # the signing key of a token that was verified once is never looked at again
        _AUTH,
        "if grant is None or now >= until:",
        "if grant is None:",
        f"{_OF_AUTH}a_key_that_is_taken_away_is_soon_worth_nothing",
    ),
    Mutant(  # tokens for other purposes are taken
        _AUTH,
        "if kind not in _TYPES:",
        "if kind is not None and not isinstance(kind, str):",
        f"{_OF_AUTH}a_wrong_token_proves_nothing",
    ),
    Mutant(  # the issuer is not compared
        _AUTH,
        "issuer=self._settings.jwt_issuer,",
        "issuer=None,",
        f"{_OF_AUTH}audience_and_issuer_are_checked_if_they_are_set",
    ),
    # --- The path of a drain ---------------------------------------------------------------------
    Mutant(  # a result overtakes the changes of its batch
        _PATH,
        "    for flow_execution_id, event in outcome.events:\n"
        "        yield changes_channel(organization_id, flow_execution_id), event\n"
        "    yield results_channel(organization_id, reply_to), outcome.record",
        "    yield results_channel(organization_id, reply_to), outcome.record\n"
        "    for flow_execution_id, event in outcome.events:\n"
        "        yield changes_channel(organization_id, flow_execution_id), event",
        f"{_OF_DRAIN}a_group_is_answered_in_order_and_leaves_nothing_behind",
    ),
    Mutant(  # a worker that ends holds its inbox up until the lease runs out
        _PATH,
        "(time.monotonic() > turn.deadline or self.stopping())",
        "(time.monotonic() > turn.deadline)",
        f"{_OF_DRAIN}a_drain_hands_over_when_the_process_is_to_end",
    ),
    Mutant(  # the events of a batch are published once for each of its copies
        _PATH,
        "if batch_id in events_of:",
        "if batch_id is None:",
        "tests/integration/test_sizes.py::test_events_of_copies_are_published_once_in_a_group",
    ),
    Mutant(  # messages behind the end of a group are acknowledged with it
        _PATH,
        "            answers.count += 1",
        "            answers.count = len(admissions)",
        "tests/integration/test_sizes.py::test_a_group_ends_where_its_events_reach_16_mib",
    ),
    Mutant(  # a message that another drain has answered gets a failure as well
        _PATH,
        "            if known.batches:",
        "            if not known:",
        "tests/integration/test_dead_letters.py::"
        "test_what_another_drain_has_answered_is_no_failure",
    ),
    Mutant(  # a connection that the worker's limit closed is a message's fault at once
        "worker/drain/blame.py",
        "(error.sqlstate is None and not is_slow)",
        "error.sqlstate is None",
        "tests/integration/test_blame.py::"
        "test_a_connection_that_the_workers_limit_closed_is_counted_as_a_time_out",
    ),
    Mutant(  # a message that fails is not kept
        _PATH,
        "            self.inbox.add_dead_letter(admitted.entry, dead_letter)\n",
        "",
        "tests/integration/test_dead_letters.py::"
        "test_a_batch_that_fails_is_kept_with_all_that_an_operator_asks_for",
    ),
    # --- Scripts ---------------------------------------------------------------------------------
    Mutant(  # an inbox takes more than its limit
        f"{_SCRIPTS}/append.lua",
        "tonumber(ARGV[1]) - waiting",
        "tonumber(ARGV[1])",
        f"{_OF_INBOX}the_bound_holds_and_what_is_accepted_is_the_beginning",
    ),
    Mutant(  # only what is appended to an empty inbox sends a drain
        f"{_SCRIPTS}/append.lua",
        "if not held then",
        "if not held and waiting == 0 then",
        f"{_OF_INBOX}an_append_behind_others_sends_a_drain_if_there_is_none",
    ),
    Mutant(  # a drain that was superseded goes on
        f"{_SCRIPTS}/ack_and_publish.lua",
        "if held and held ~= 'running ' .. ARGV[1] then",
        "if held and held == 'queued ' .. ARGV[1] then",
        f"{_OF_INBOX}a_lease_that_runs_out_is_free_and_its_old_holder_must_stop",
    ),
    Mutant(  # an inbox that is empty keeps its lease
        f"{_SCRIPTS}/_read_head.lua",
        "redis.call('DEL', lease)",
        "redis.call('SET', lease, 'running ' .. run, 'PX', lease_ms)",
        f"{_OF_INBOX}a_drain_that_finds_nothing_leaves_no_lease",
    ),
    Mutant(  # a message larger than the bound is never read
        f"{_SCRIPTS}/_read_head.lua",
        "if #entries > 0 and bytes > tonumber(max_bytes) then",
        "if bytes > tonumber(max_bytes) then",
        f"{_OF_INBOX}a_read_is_bounded_in_bytes_but_never_empty",
    ),
    Mutant(  # a drain that was superseded takes the lease back
        f"{_SCRIPTS}/requeue.lua",
        "if held and held ~= 'running ' .. ARGV[1] then",
        "if held and string.sub(held, 1, 8) ~= 'running ' then",
        f"{_OF_INBOX}a_lease_that_runs_out_is_free_and_its_old_holder_must_stop",
    ),
    Mutant(  # a drain that was superseded keeps the lease of the one that runs alive
        f"{_SCRIPTS}/renew.lua",
        "if held_lease(KEYS[1]) ~= 'running ' .. ARGV[1] then",
        "if not held_lease(KEYS[1]) then",
        f"{_OF_INBOX}a_run_renews_no_lease_but_its_own",
    ),
    Mutant(  # a lease without a time to live holds an inbox for ever
        f"{_SCRIPTS}/_lease.lua",
        "if left < 0 or left > 60000 then",
        "if left > 60000 then",
        "tests/integration/test_repair.py::test_a_lease_that_nobody_frees_is_free",
    ),
    Mutant(  # a failure of the message before counts for this one
        f"{_SCRIPTS}/count_failure.lua",
        "if redis.call('HGET', KEYS[1], 'entry') ~= ARGV[1] then",
        "if false then",
        f"{_OF_INBOX}failures_are_counted_for_each_message",
    ),
    Mutant(  # an inbox of more than a page is rebuilt in part
        f"{_SCRIPTS}/rebuild.lua",
        "    from = '(' .. entry[1]\n",
        "    from = '(18446744073709551615-18446744073709551615'\n",
        "tests/integration/test_repair.py::test_a_stream_that_has_reached_its_last_id_is_rebuilt",
    ),
    # --- Statements ------------------------------------------------------------------------------
    Mutant(  # two drains of an organization work side by side
        _STATEMENTS,
        "               for update) as locked",
        "               ) as locked",
        f"{_OF_REPOSITORY}two_drains_of_one_organization_take_turns",
    ),
    Mutant(  # the time is read before the lock is held
        _STATEMENTS,
        "    select clock_timestamp(), position",
        "    select now(), position",
        f"{_OF_REPOSITORY}the_time_of_a_transaction_is_that_at_which_it_has_the_lock",
    ),
    Mutant(  # tags that were removed are found
        _STATEMENTS,
        "and tag = k.tag and status = 'active'",
        "and tag = k.tag",
        f"{_OF_REPOSITORY}removed_tags_keep_their_rows",
    ),
    Mutant(  # registering again begins with revision 1 again
        _STATEMENTS,
        "set task_names = excluded.task_names,",
        "set task_names = excluded.task_names, revision = excluded.revision,",
        f"{_OF_REPOSITORY}registering_again_keeps_the_revision",
    ),
    Mutant(  # results that are younger than the retention are deleted
        _STATEMENTS,
        "and applied_at < (select clock_timestamp() - %(age)s::interval)",
        "and applied_at > (select clock_timestamp() - %(age)s::interval)",
        f"{_OF_REPOSITORY}purging_forgets_old_results_of_that_organization_alone",
    ),
    Mutant(  # a batch that took effect is forgotten, and then applied again
        _STATEMENTS,
        "       and result_record #>> '{error,code}' = 'internal_error'\n",
        "",
        "tests/integration/test_dead_letters.py::"
        "test_only_a_failure_of_the_own_organization_is_forgotten",
    ),
)
