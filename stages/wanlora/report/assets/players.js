for (const player of document.querySelectorAll(".player")) {
  const videos = [...player.querySelectorAll("video")], lead = videos[0];
  const button = player.querySelector("button"), slider = player.querySelector("input");
  const seek = time => videos.forEach(video => { video.currentTime = time; });
  const play = () => { seek(lead.currentTime); videos.forEach(video => video.play().catch(() => {})); };
  const pause = () => { videos.forEach(video => video.pause()); seek(lead.currentTime); };
  const toggle = () => lead.paused ? play() : pause();
  button.addEventListener("click", toggle);
  videos.forEach(video => video.addEventListener("click", toggle));
  lead.addEventListener("play", () => { button.textContent = "\u23F8"; follow(); });
  lead.addEventListener("pause", () => { button.textContent = "\u25B6"; });
  slider.addEventListener("input", () => { pause(); seek(slider.value * lead.duration); });
  const follow = () => {
    slider.value = lead.duration ? lead.currentTime / lead.duration : 0;
    for (const video of videos.slice(1)) {
      if (Math.abs(video.currentTime - lead.currentTime) > 0.06) video.currentTime = lead.currentTime;
    }
    if (!lead.paused) requestAnimationFrame(follow);
  };
  new IntersectionObserver(([entry]) => { if (!entry.isIntersecting) pause(); }).observe(player);
}
const rows = [...document.querySelectorAll(".player")];
document.querySelector("#play-all")?.addEventListener("click", () => {
  const shown = rows.filter(row => { const box = row.getBoundingClientRect();
    return box.top < innerHeight && box.bottom > 0; });
  const any = shown.some(row => !row.querySelector("video").paused);
  shown.forEach(row => { if (row.querySelector("video").paused !== any) row.querySelector("button").click(); });
});
