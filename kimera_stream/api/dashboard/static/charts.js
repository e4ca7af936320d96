// Small line charts of the last values, drawn on a canvas in the colours of the theme.

const KEPT = 120;

export class Sparkline {
  constructor(canvas, colour) {
    this.canvas = canvas;
    this.colour = colour;
    this.values = [];
  }

  push(value) {
    this.values.push(value);
    if (this.values.length > KEPT) this.values.shift();
    this.draw();
  }

  draw() {
    const ratio = window.devicePixelRatio || 1;
    const width = this.canvas.clientWidth;
    const height = this.canvas.clientHeight;
    if (!width || this.values.length < 2) return;
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const low = Math.min(...this.values);
    const span = Math.max(...this.values) - low || 1;
    const x = (index) => (index / (this.values.length - 1)) * (width - 4) + 1;
    const y = (value) => height - 4 - ((value - low) / span) * (height - 8);
    const colour = getComputedStyle(document.documentElement).getPropertyValue(this.colour).trim();
    context.beginPath();
    this.values.forEach((value, index) => (index ? context.lineTo(x(index), y(value)) : context.moveTo(x(0), y(value))));
    context.strokeStyle = colour;
    context.lineWidth = 1.75;
    context.lineJoin = "round";
    context.stroke();
    context.lineTo(x(this.values.length - 1), height);
    context.lineTo(x(0), height);
    context.closePath();
    context.globalAlpha = 0.12;
    context.fillStyle = colour;
    context.fill();
    context.globalAlpha = 1;
    context.beginPath();
    context.arc(x(this.values.length - 1), y(this.values.at(-1)), 2.2, 0, 7);
    context.fill();
  }
}
