const form = document.querySelector("#form");
const boxes = () => [...form.querySelectorAll("input[name=run]")];
const count = () => {
  const number = boxes().filter(box => box.checked).length;
  form.querySelector("button").disabled = number < MIN || number > MAX;
  const text = number ? `${number} selected (MIN to MAX)` : "select MIN to MAX runs";
  document.querySelector("#chosen").textContent = text;
};
const keep = () => {
  const chosen = new Set(boxes().filter(box => box.checked).map(box => box.value));
  return () => {
    for (const box of boxes()) box.checked = chosen.has(box.value);
    const head = form.querySelector("th[data-order]");
    if (head) { head.dataset.order = head.dataset.order === "up" ? "down" : "up"; head.click(); }
    count();
  };
};
form.addEventListener("change", count);
count();
setInterval(() => refresh(keep), REFRESH_MS);
