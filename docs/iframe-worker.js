// The search runs in a Worker, which a page that is read from the disk may not start: there it runs in a hidden frame.
// The theme looks for this name, and would else fetch a script of the same purpose from outside.
if (location.protocol === "file:") {
  window.Worker = window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.scope = frame.contentWindow;
      this.scope.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      this.ready = new Promise(loaded => {
        const script = frame.contentDocument.createElement("script");
        script.src = url;
        script.onload = loaded;
        frame.contentDocument.body.append(script);
      });
    }

    postMessage(data) {
      this.ready.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
