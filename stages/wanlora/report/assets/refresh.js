const refresh = async keep => {
  if (document.hidden) return;
  const note = document.querySelector("#fresh");
  try {
    const answer = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(20000) });
    if (!answer.ok) throw new Error(answer.status);
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const restore = keep();
    for (const part of document.querySelectorAll("[data-live]")) {
      const newer = fresh.getElementById(part.id);
      if (newer) part.replaceWith(document.adoptNode(newer));
    }
    restore();
    note.className = "soft"; note.textContent = `Updated ${new Date().toLocaleTimeString()}.`;
  } catch {
    note.className = "bad"; note.textContent = "wanlora watch does not answer: these numbers are old.";
  }
};
