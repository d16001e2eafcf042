"""Settings of `wanlora config`."""

from wanlora.config.settings import Settings, setting


class ConfigConfig(Settings):
    """Print the settings of a command, or a job for `wanlora run`, as a commented TOML file."""

    command: str | None = setting(
        None,
        "Name of a command.",
        flag="Options",
        argument=True,
        unset="the most used settings of a whole job",
    )
