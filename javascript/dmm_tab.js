// The tab DMM, in the webuis (which load this file by themselves) and alone: asks how far things are while it is on the
// screen, brings the card into sight, and takes what the panels send.
(() => {
  const root = () => (typeof gradioApp === "function" ? gradioApp() : document);
  const find = (selector) => root().querySelector(selector);
  const visible = (element) => element && element.getClientRects().length > 0;
  const LIVE = 1000, QUIET = 5000; // milliseconds between two questions

  const press = (id) => {
    const element = find(`#${id}`);
    const button = element && (element.tagName === "BUTTON" ? element : element.querySelector("button"));
    if (button) button.click();
  };

  let last = 0;
  setInterval(() => {
    if (document.hidden || !visible(find("#dmm_page"))) return;
    const wait = find("#dmm_card [data-live='1']") ? LIVE : QUIET;
    if (Date.now() - last < wait) return;
    last = Date.now();
    press("dmm_poll");
  }, 250);

  // Another checkpoint was chosen at the top of the page: the panels look again, while the webui loads it.
  const CHOSEN = "#setting_sd_model_checkpoint input, input[aria-label='Checkpoint']"; // the latter in Forge
  let checkpoint;
  setInterval(() => {
    const field = find(CHOSEN);
    if (!field || field === document.activeElement || field.value === checkpoint) return;
    const first = checkpoint === undefined;
    checkpoint = field.value;
    if (first) return; // the page has just been opened, and fills the panels itself
    for (const wait of [0, 2, 5, 10, 20]) {
      setTimeout(() => {
        for (const tab of ["txt2img", "img2img"]) press(`script_${tab}_dmm_styles_refresh`);
      }, wait * 1000);
    }
  }, 500);

  const tab = (within, label) => {
    for (const button of root().querySelectorAll(`${within} button`)) {
      if (button.textContent.trim() === label) return button.click();
    }
  };

  // A panel's "Send to tab": the weights wait at the server.
  window.dmmOpenMix = () => {
    tab("#tabs", "DMM");
    tab("#dmm_tabs", "Mix & export");
    press("dmm_receive");
  };

  // After a start: on a phone the card is far below.
  window.dmmShowCard = () => {
    last = 0;
    const card = find("#dmm_side");
    setTimeout(() => {
      if (card && card.getBoundingClientRect().top > window.innerHeight * 0.8 && find("#dmm_card [data-live='1']")) {
        card.scrollIntoView({ behavior: "smooth" });
      }
    }, 900);
  };

  document.addEventListener("click", (event) => {
    const picture = event.target.closest && event.target.closest(".dmm-picture img");
    if (picture) picture.classList.toggle("dmm-whole");
  });
})();
