setInterval(() => refresh(() => () => {}), REFRESH_MS);
