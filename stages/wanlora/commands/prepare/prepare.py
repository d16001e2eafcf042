"""Stage zero: find sources, check them, cut, split, plan, and write a manifest.

Owns: the order of the steps, and the conversion of settings to their arguments.
"""

import re
import time
from functools import partial

from wanlora.commands.prepare.cuts import Rules
from wanlora.commands.prepare.earlier_manifest import (
    note_copies,
    note_moved,
    require_choice,
    with_edits,
)
from wanlora.commands.prepare.make import ClipRules
from wanlora.commands.prepare.output import (
    materialize_clips,
    nothing_left,
    plan_clips,
    require_outputs,
    write_errors,
    write_manifests,
    write_sheet,
)
from wanlora.commands.prepare.sources import check_sources, cut_sources, find_sources
from wanlora.commands.prepare.split import split_clips
from wanlora.commands.prepare.summary import PrepareResult, notes_on, summarize
from wanlora.config import PrepareConfig, command_line
from wanlora.core.aspect import LENGTH_STEP
from wanlora.core.buckets import TEMPORAL_FACTOR
from wanlora.data.edits import compare_without_record, find_edits, reading_of, without_edits
from wanlora.errors import ConfigError


def run(config: PrepareConfig) -> PrepareResult:
    """Make a manifest, or with `dry_run` only the plan of one.

    Raises:
        ManifestError: There is no video, no caption, or not a single clip; errors.jsonl then has
            the reasons.
        ConfigError: group_pattern is not a regular expression with a group, or PySceneDetect is
            selected and cannot be used.
        OutputError: An output may not be written, or is a file of another program.
    """
    output, is_real = config.output, not config.dry_run
    rules = clip_rules(config)
    require_outputs(output, config.html)
    edits = find_edits(output)
    if is_real and (edits.recorded or edits.bad):
        require_choice(edits, config.edits, output)

    since_ns = time.time_ns()
    found = find_sources(config.sources, config.captions, caption_prefix=rules.caption_prefix)
    how_read = reading_of(
        found.tables,
        command=command_line("prepare", config, without=("dry_run", "html", "edits")),
        since_ns=since_ns,
        sidecars=config.captions is None,
        prefix=rules.caption_prefix,
    )
    outcomes, hashes = check_sources(
        found.sources, output, rules, workers=config.workers, stall_s=config.stall_s
    )
    cut, failures, video_s = cut_sources(found, outcomes, rules)
    if not cut:
        write_errors(output, failures)
        raise nothing_left(found, failures, output)

    split = partial(split_clips, val_fraction=config.val_fraction, seed=config.seed)
    made = split(cut, found.sources)
    edits = compare_without_record(edits, made, split(cut, found.sources, as_0_1_0=True))
    if is_real:  # a dry run does not change the files of the manifest
        require_choice(edits, config.edits, output)
        write_errors(output, failures)
    clips, notes = with_edits(made, edits, config.edits)
    notes += note_moved(output, clips)
    clips, tokens, plan = plan_clips(clips, config.model)
    if config.html is not None:
        write_sheet(config.html, clips, failures, plan, tokens, most=config.html_clips)

    if is_real and config.materialize is not None:
        clips, failures = materialize_clips(clips, failures, output, hashes)
        if not clips:
            raise nothing_left(found, failures, output)
    if is_real:
        notes += note_copies(output, edits)
        unedited = without_edits(clips, made, edits.removed if config.edits == "keep" else ())
        write_manifests(output, clips, unedited, how_read, hashes)
    notes += notes_on(found, clips, rules, val_fraction=config.val_fraction)
    return summarize(
        found, clips, failures, video_s, plan, tokens.counts,
        output=output, notes=notes, dry_run=config.dry_run,
        val_fraction=config.val_fraction, max_error_rate=config.max_error_rate,
    )  # fmt: skip


def clip_rules(config: PrepareConfig) -> ClipRules:
    """Rules of the clips that the settings describe.

    Raises:
        ConfigError: group_pattern is not a regular expression with a group.
    """
    step = LENGTH_STEP if config.buckets else TEMPORAL_FACTOR
    return ClipRules(
        cut=Rules(
            num_frames=config.num_frames,
            fps=config.fps,
            mode=config.mode,
            stride=config.stride or max(1, config.num_frames // 2),
            count=config.count,
            short=config.short,
            min_frames=config.min_frames,
            lengths=config.lengths or range(1, config.num_frames + 1, step),
        ),
        height=config.height,
        width=config.width,
        keep_aspect=config.buckets,
        cross_scenes=config.scenes == "allow",
        # Cuts are found even if clips may cross them: such a clip gets a warning.
        detector="builtin" if config.scenes == "allow" else config.scenes,
        allow_hdr=config.allow_hdr,
        allow_low_fps=config.allow_low_fps,
        caption_prefix=config.caption_prefix.strip(),
        group_pattern=_compile(config.group_pattern),
        folder=config.output,
    )


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"group_pattern {pattern!r} is not a regular expression: {error}"
        ) from None
    if compiled.groups < 1:
        raise ConfigError(
            f"group_pattern {pattern!r} has no group; put ( ) around the video's name"
        )
    return compiled
