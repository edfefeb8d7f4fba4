"use strict";

// Redoc on this server's own description, in the colours that the visitor prefers.
const light = {};
const night = {
  colors: {
    primary: { main: "#6ea8fe" },
    success: { main: "#5fd38d" },
    warning: { main: "#e3b341" },
    error: { main: "#ff7b72" },
    text: { primary: "#d8dee6", secondary: "#9aa4b2" },
    border: { dark: "#3a424d", light: "#2a3038" },
    responses: {
      success: { color: "#5fd38d", backgroundColor: "#16261c" },
      error: { color: "#ff7b72", backgroundColor: "#2b1a1a" },
    },
  },
  schema: { nestedBackground: "#1b2027", linesColor: "#3a424d", typeNameColor: "#9aa4b2", typeTitleColor: "#9aa4b2" },
  sidebar: { backgroundColor: "#1b2027", textColor: "#d8dee6", activeTextColor: "#6ea8fe" },
  rightPanel: { backgroundColor: "#0d1014" },
  codeBlock: { backgroundColor: "#171b21" },
  typography: { links: { color: "#6ea8fe" }, code: { backgroundColor: "#22272e", color: "#ffa198" } },
};

function draw() {
  const theme = matchMedia("(prefers-color-scheme: dark)").matches ? night : light;
  const system = { typography: { fontFamily: "system-ui, sans-serif", headings: { fontFamily: "system-ui, sans-serif" } } };
  theme.typography = { ...theme.typography, ...system.typography };
  Redoc.init("openapi.json", { theme, sideNavStyle: "path-only", nativeScrollbars: true }, document.getElementById("redoc"));
}

draw();
